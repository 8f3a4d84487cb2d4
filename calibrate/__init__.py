"""Arrays in, quantization parameters out. Imports numpy and ml_dtypes only; knows no graphs."""
