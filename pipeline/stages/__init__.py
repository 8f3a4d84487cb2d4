"""One file and one public function per stage: from a model and data to a quantized model and a report."""
