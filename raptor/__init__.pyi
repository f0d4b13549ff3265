from .core import RaptorError as RaptorError, seed_everything as seed_everything
from .data.load import load_dataset as load_dataset
from .teacher.backbone import Backbone as Backbone
from .trajectories.cache import CachedTrajectories as CachedTrajectories
from .trajectories.live import LiveTrajectories as LiveTrajectories, write_cache as write_cache
from .phases import (
    FragmentedPhases as FragmentedPhases,
    Phases as Phases,
    layer_distance as layer_distance,
    max_cut as max_cut,
    recursive_max_cut as recursive_max_cut,
)
from .model.block import BlockConfig as BlockConfig, RecurrentBlock as RecurrentBlock
from .model.raptor import Raptor as Raptor
from .model.as_backbone import RaptorBackbone as RaptorBackbone
from .model.authors import import_author_checkpoint as import_author_checkpoint
from .model.deploy import early_exit as early_exit, materialize as materialize
from .model.export import export_model as export_model
from .train.stages import TrainConfig as TrainConfig, train_raptor as train_raptor, train_span as train_span
from .probes.heads import probe_task as probe_task
from .probes.train import (
    ProbeConfig as ProbeConfig,
    evaluate_heads as evaluate_heads,
    fidelity as fidelity,
    train_probe as train_probe,
)
from .analysis.alignment import compare_models as compare_models, path_statistics as path_statistics
from .analysis.dynamics import (
    angular_speed as angular_speed,
    brh_epsilon as brh_epsilon,
    directional_convergence as directional_convergence,
)
from .analysis.inside import attention_maps as attention_maps, site_trajectory as site_trajectory
from .analysis.patching import patching_effects as patching_effects, run_patched as run_patched
from .analysis.readout import knn_accuracy as knn_accuracy, logit_lens as logit_lens
from .figures.plots import plot_similarity as plot_similarity
from .study.study import Study as Study
from .pipeline.recipe import DistillConfig as DistillConfig
from .pipeline.distill import distill as distill

__version__: str
