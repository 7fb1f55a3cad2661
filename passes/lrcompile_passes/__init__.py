"""The built-in passes, in pipeline order: the first plugin package of lrcompile."""

from lrcompile.passes import Pass
from lrcompile_passes.branch_tucker import BranchTucker
from lrcompile_passes.compose_linear import ComposeLinear
from lrcompile_passes.factorize_conv3d import FactorizeConv3d
from lrcompile_passes.fold_affine import FoldAffine
from lrcompile_passes.fold_batch_norm import FoldBatchNorm
from lrcompile_passes.fold_layer_norm import FoldLayerNorm
from lrcompile_passes.fold_layout import FoldLayout
from lrcompile_passes.group_heads import GroupHeads
from lrcompile_passes.low_rank_conv import LowRankConv
from lrcompile_passes.low_rank_embedding import LowRankEmbedding
from lrcompile_passes.low_rank_linear import LowRankLinear
from lrcompile_passes.merge_pointwise import MergePointwise
from lrcompile_passes.merge_siblings import MergeSiblings
from lrcompile_passes.remove_identity import RemoveIdentity

PASSES: tuple[Pass, ...] = (
    RemoveIdentity(),
    FoldLayout(),
    FoldBatchNorm(),
    FoldAffine(),
    FoldLayerNorm(),
    LowRankLinear(),
    LowRankConv(),
    FactorizeConv3d(),
    BranchTucker(),
    MergePointwise(),
    LowRankEmbedding(),
    GroupHeads(),
    MergeSiblings(),
    ComposeLinear(),
)
