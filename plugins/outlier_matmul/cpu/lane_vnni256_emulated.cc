#define QPIPE_EMULATE_VNNI
#include "lane_vnni256.cc"
