"""Adding to a run's config, without what LangChain's own merging adds.

`merge_configs` takes what is missing from the context around it: inside a recovery's node that is
the recovery's own thread and callbacks. And it adds lists of callbacks up, though the workflow that
is run adds its own once more.
"""

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.runnables import RunnableConfig


def with_callback(config: RunnableConfig, handler: BaseCallbackHandler) -> RunnableConfig:
    """Return a config with one more callback; once, if it has it already."""
    callbacks = config.get("callbacks")
    if callbacks is None or isinstance(callbacks, list):
        known = callbacks or []
        return config if handler in known else {**config, "callbacks": [*known, handler]}
    if handler in callbacks.handlers:
        return config
    manager = callbacks.copy()
    manager.add_handler(handler, inherit=True)
    return {**config, "callbacks": manager}


def but_its_own(config: RunnableConfig, own: RunnableConfig | None) -> RunnableConfig:
    """Return a config without the callbacks that a workflow has of its own: it adds them itself."""
    callbacks, known = config.get("callbacks"), (own or {}).get("callbacks")
    if not isinstance(callbacks, list) or not isinstance(known, list):
        return config
    return {**config, "callbacks": [one for one in callbacks if one not in known]}
