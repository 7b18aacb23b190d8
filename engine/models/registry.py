"""Every family, by the name in the `architectures` of its checkpoints."""

from engine.models.deepseek_v2 import DEEPSEEK_V2
from engine.models.deepseek_v3 import DEEPSEEK_V3
from engine.models.family import Family
from engine.models.gemma2 import GEMMA2
from engine.models.gemma3 import GEMMA3
from engine.models.gpt_oss import GPT_OSS
from engine.models.granite import GRANITE
from engine.models.llama import LLAMA
from engine.models.mistral import MISTRAL
from engine.models.mixtral import MIXTRAL
from engine.models.olmo2 import OLMO2
from engine.models.phi3 import PHI3
from engine.models.qwen2 import QWEN2
from engine.models.qwen2_moe import QWEN2_MOE
from engine.models.qwen3 import QWEN3
from engine.models.qwen3_moe import QWEN3_MOE

_FAMILIES = (
    LLAMA,
    MISTRAL,
    QWEN2,
    QWEN3,
    GEMMA2,
    GEMMA3,
    PHI3,
    OLMO2,
    GRANITE,
    MIXTRAL,
    QWEN2_MOE,
    QWEN3_MOE,
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    GPT_OSS,
)
FAMILY_OF_ARCHITECTURE: dict[str, Family] = {family.architecture: family for family in _FAMILIES}
