"""Serve engine directories over HTTP, with the Open Inference Protocol that Triton, KServe and their clients speak.

::

    settings.py     options and limits                               nothing
    server.py       sockets, signals, start and stop                 uvicorn
    connection.py   requests of one connection, and their limits     uvicorn
    framing.py      a connection's bytes, cut into requests          |
    app.py          routes, errors, request ids                      starlette
    metrics.py      what is counted                                  prometheus-client
    repository.py   names and versions, reload                       |
    model.py        one engine directory, checked, loaded, warm      | numpy alone
    batching.py     the queue and the engine's threads               |
    shapes.py       length buckets out of the engine's profiles      |
    text.py         sentences to tokens, classes to names            |
    long_texts.py   far too long ones, at a cost they are worth      | (in Triton's repositories, too)
    protocol.py     bytes to tensors and back                        |
    content_coding.py   compressed bodies                            |
    statistics.py   what Triton's clients ask about a model          |

A request is parsed by `protocol`, checked against its model, queued, run together with what else is waiting, and
answered. Whoever outgrows one machine takes the same engines and the same client code to Triton (`engines.triton`).
"""
