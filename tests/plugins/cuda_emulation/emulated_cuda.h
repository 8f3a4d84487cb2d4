// CUDA's keywords for g++: kernels become plain functions, run thread by thread by emulator.h.
#pragma once

#define __global__ static
#define __grid_constant__
#define __launch_bounds__(...)

#include "emulator.h"

// What the emulated TMA needs to know of a byte matrix; `const` data, as CUDA's opaque descriptor is.
struct CUtensorMap {
    const unsigned char* base;
    int64_t rows;
    int row_bytes;
    int box_rows;
};
