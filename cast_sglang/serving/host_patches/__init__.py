"""What the plugin changes in SGLang's own objects: the files to check against a new release."""
