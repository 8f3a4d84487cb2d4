"""OutlierMatMul: LLM.int8()'s mixed-precision product as an ONNX operator; see README.md beside this file."""
