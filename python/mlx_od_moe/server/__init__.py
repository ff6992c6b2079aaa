"""The server: OpenAI's API over a model whose experts stay on disk, and pages to watch it.

mlx-lm's own server answers; around it stand checks of what requests may ask for, a bound on how
many there are, and what it counts.
"""

from .http_server import Server
from .request_checks import RequestError
from .settings import Settings

__all__ = ["RequestError", "Server", "Settings"]
