"""The public names for type checkers and editors; `__init__.py` imports them when asked for.

In front stand the verbs, and the classes that a user makes or catches. Four modules have the rest:
`algebra` what gives an adapter another shape, `analysis` figures, `classes` what functions take and
return, `extending` what registers kinds, variants and formats of one's own.
"""

from lora_inject import algebra as algebra
from lora_inject import analysis as analysis
from lora_inject import classes as classes
from lora_inject import extending as extending
from lora_inject.algebra.combining import combine as combine
from lora_inject.algebra.combining import diff as diff
from lora_inject.algebra.combining import truncate as truncate
from lora_inject.checkpoint.conversion import check_adapter as check_adapter
from lora_inject.checkpoint.conversion import convert as convert
from lora_inject.checkpoint.extract import extract_adapter as extract_adapter
from lora_inject.checkpoint.merge import merge_checkpoint as merge_checkpoint
from lora_inject.core.adapter.state import AdapterState as AdapterState
from lora_inject.core.model.eject import eject as eject
from lora_inject.core.model.inject import inject as inject
from lora_inject.core.model.inject import plan as plan
from lora_inject.core.model.listing import adapters as adapters
from lora_inject.core.model.listing import summary as summary
from lora_inject.core.model.load import install as install
from lora_inject.core.model.load import load_adapter as load_adapter
from lora_inject.core.model.merge import merge as merge
from lora_inject.core.model.merge import merged_weights as merged_weights
from lora_inject.core.model.read_off import adapter_state as adapter_state
from lora_inject.core.model.save import save_adapter as save_adapter
from lora_inject.core.model.slots import reserve as reserve
from lora_inject.core.model.swap import swap_adapter as swap_adapter
from lora_inject.core.model.training import adapter_parameters as adapter_parameters
from lora_inject.core.model.training import parameter_groups as parameter_groups
from lora_inject.core.model.training import train_only as train_only
from lora_inject.core.model.undo import unmerge as unmerge
from lora_inject.core.model.used import unreached as unreached
from lora_inject.core.roots.selecting import activate as activate
from lora_inject.core.roots.selecting import disabled as disabled
from lora_inject.core.spec.config import Config as Config
from lora_inject.errors import CheckpointError as CheckpointError
from lora_inject.errors import ConfigError as ConfigError
from lora_inject.errors import FormatError as FormatError
from lora_inject.errors import LayerError as LayerError
from lora_inject.errors import LoraInjectError as LoraInjectError
from lora_inject.errors import MatchError as MatchError
from lora_inject.errors import ServerError as ServerError
from lora_inject.errors import StateError as StateError
from lora_inject.formats.exchange import read_adapter as read_adapter
from lora_inject.formats.exchange import write_adapter as write_adapter
from lora_inject.formats.from_peft import from_peft as from_peft
from lora_inject.integrations.publishing import push as push
from lora_inject.integrations.trainer import AdapterCheckpoint as AdapterCheckpoint
from lora_inject.integrations.trl import reference as reference
from lora_inject.rows.routed import routed as routed
from lora_inject.rows.routed import see_rows as see_rows
from lora_inject.serving.peft_state import peft_state as peft_state
from lora_inject.serving.verifying import verify_loaded as verify_loaded
from lora_inject.serving.verifying import verify_served as verify_served
from lora_inject.trials.losses import causal_loss as causal_loss
from lora_inject.trials.runs import Trials as Trials
from lora_inject.trials.trial import Trial as Trial
from lora_inject.version import __version__ as __version__
