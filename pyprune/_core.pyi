import numpy as np
import numpy.typing as npt

def rank_variants() -> dict[str, str]: ...
def rank(
    maps: npt.NDArray[np.floating] | npt.NDArray[np.uint16], rtol: float, variant: str, threads: int, dtype: str = ""
) -> npt.NDArray[np.int32]: ...
