"""One decoder on 1, 2, 4 or 8 ranks of torch.distributed: started by torchrun, the same bits on any number of them."""
from .cut import check, local
from .join import Ranks, join, leave
from .sharded import Sharded, load

__all__ = ["Ranks", "Sharded", "check", "join", "leave", "load", "local"]
