"""`sluiceway.deploy.flower` under its name of 0.1."""

from sluiceway.deploy.flower import __getattr__ as __getattr__
