"""SmolLM2-135M-Instruct: from the package that carries it to a folder that SGLang serves."""
