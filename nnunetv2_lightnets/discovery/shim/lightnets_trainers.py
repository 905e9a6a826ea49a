"""The one module that nnU-Net finds in this folder: it hands out our trainers by name.

nnU-Net forgets every module it found in an external folder. The trainers live in the package instead, so each
stays one class, can be pickled, and is imported only when somebody asks for it.
"""

from nnunetv2_lightnets.discovery.lookup import trainer_or_attribute_error as __getattr__  # noqa: F401
