"""ComfyUI-Tonfa as ComfyUI imports it: node maps and nothing else. Torch, Triton and the host are imported when a node is used."""

NODE_CLASS_MAPPINGS: dict = {}
NODE_DISPLAY_NAME_MAPPINGS: dict = {}
WEB_DIRECTORY = "./web"

if __package__:  # empty when a tool imports this file as a bare module: there are no neighbours to import then
    from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY"]
