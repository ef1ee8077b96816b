import numpy as np
import numpy.typing as npt

def rank_variants() -> dict[str, str]: ...
def rank(
    maps: npt.NDArray[np.float32] | npt.NDArray[np.float64], rtol: float, variant: str, threads: int
) -> npt.NDArray[np.int32]: ...
