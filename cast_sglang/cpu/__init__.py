"""The SGLang platform `cast_cpu`: it runs SGLang, EAGLE and CAST on a CPU in plain torch."""
