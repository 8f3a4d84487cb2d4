"""Custom operators: contract, numpy reference, function body and native kernels; nothing needs the library to import."""
