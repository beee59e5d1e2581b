"""A policy behind openpi's websocket protocol: `python -m openpi_opt.serve`.

`wire` is the encoding, `server` the server, `fake_robot` a robot's closed loop against it.
"""
