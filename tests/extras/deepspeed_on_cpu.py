"""Lets Lightning train by DeepSpeed on the CPU, through gloo, which it refuses: for tests alone."""

import argparse
import types

import lightning.pytorch.strategies.deepspeed as lightnings
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy

from archzoo.training import deepspeed

NAMESPACE = types.SimpleNamespace(Namespace=lambda device_rank: argparse.Namespace(device_rank=-1))
deepspeed.on_cuda = lambda accelerator: True
lightnings._validate_device_index_selection = lambda devices: None
lightnings.argparse = NAMESPACE  # the CPU has no index
DeepSpeedStrategy.setup_environment = DDPStrategy.setup_environment
