"""GGUF quantisation by the reference encoder of the ``gguf`` package, in memory."""

from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator
from torch import Tensor

from durometer.core.budget import Spent
from durometer.core.errors import InputError, NotApplicableError
from durometer.core.quantisation import gguf, gguf_bits, gguf_block
from durometer.core.seeds import Seeds
from durometer.core.settings import Levels, setting
from durometer.domains.base import Domain
from durometer.subjects.base import Subject
from durometer.tampers.base import Realised, tamper
from durometer.tampers.quantize import FULL_BITS, WeightOnly, WeightOnlySettings


def _names(value: Any) -> Any:
    return tuple(value.replace("/", " ").split()) if isinstance(value, str) else value


def _encodable(names: tuple[str, ...]) -> tuple[str, ...]:
    try:
        bits = {name: gguf_bits(name) for name in names}
    except InputError as error:
        raise ValueError(str(error)) from None
    if len(set(bits.values())) < len(names):
        raise ValueError("two of the types have the same bits a weight; try them one by one")
    return tuple(sorted(names, key=lambda name: -bits[name]))


class QuantizeGgufSettings(WeightOnlySettings):
    """Settings of ``quantize_gguf``."""

    types: Annotated[tuple[str, ...], BeforeValidator(_names), AfterValidator(_encodable)] = (
        setting(
            ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0"),
            "GGUF types that the gguf package encodes, tried from most to fewest bits",
            search=Levels(("Q8_0", "Q4_0")),
            min_length=1,
        )
    )


@tamper("quantize_gguf", aliases=("quantize-gguf",))
class QuantizeGguf(WeightOnly[QuantizeGgufSettings]):
    """Matrices encoded to a GGUF type and decoded, bit for bit as the package does it."""

    summary = "GGUF quantisation of the blocks' matrices: Q8_0, Q5_1, Q5_0, Q4_1, Q4_0"
    cost = "O(weights)"
    source = "ggml-org/llama.cpp, gguf-py/gguf/quants.py; arXiv 2505.23786"
    cannot_show = "k-quants and importance matrices, whose encoders search their scales in C"
    settings_class = QuantizeGgufSettings

    def strengths(self) -> tuple[float, ...]:
        """Return the bits a weight that each type takes from 16."""
        return tuple(FULL_BITS - gguf_bits(name) for name in self.settings.types)

    def prepare(
        self, subject: Subject, data: Domain, seeds: Seeds, realised: Realised, spent: Spent
    ) -> None:
        """Leave out matrices whose rows no whole number of blocks fills, and say which.

        Raises:
            NotApplicableError: none is left.
        """
        super().prepare(subject, data, seeds, realised, spent)
        block = max(gguf_block(name) for name in self.settings.types)
        odd = [matrix.name for matrix in self._matrices if matrix.maps().shape[-1] % block]
        self._matrices = [matrix for matrix in self._matrices if matrix.name not in set(odd)]
        if not self._matrices:
            raise NotApplicableError(f"no matrix has rows of a multiple of {block} weights")
        realised.facts |= {"rows_do_not_fit": odd, "matrices": len(self._matrices)}

    def one(self, weight: Tensor, strength: float, facts: dict[str, Any]) -> Tensor:
        """Return ``weight`` as the type of this strength holds it."""
        name = self.settings.types[self.strengths().index(strength)]
        facts |= {"type": name, "bits": FULL_BITS - strength}
        return gguf(weight, name)
