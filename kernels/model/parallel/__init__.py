"""One decoder on 1, 2, 4 or 8 ranks of torch.distributed: started by torchrun, the same bits on any number of them."""
from .cut import check, local
from .join import Ranks, ends_where_lost, join, leave
from .sharded import Sharded, load

__all__ = ["Ranks", "Sharded", "check", "ends_where_lost", "join", "leave", "load", "local"]
