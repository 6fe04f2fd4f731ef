"""Turn latent flow transformers into pixel-space AsymFlow models; docs/method.md and docs/design.md explain how."""

import logging

# At import it warns that an optional 4-bit inference kernel is missing, which nothing here uses.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# Pipelines whose image encoders nothing here uses; it would stand above every command's output.
logging.getLogger("transformers.utils.import_utils").addFilter(
    lambda record: "requires torchvision (not installed)" not in record.getMessage()
)
