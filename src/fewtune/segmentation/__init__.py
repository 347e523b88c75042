"""Binary segmentation: models that draw one mask, their data, their measures."""
