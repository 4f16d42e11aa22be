"""A plain Flower app, as its documentation writes one: a ServerApp with `FedAvg`, a ClientApp with train and evaluate.

The model is one array of float32 numbers; training adds a small constant to it, and numpy is all that is imported, so a
round's time is Flower's own. The app notes the times of its rounds, and its memory, in the file that its config names.
"""

import json
import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

server = ServerApp()
client = ClientApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    sites = int(config["sites"])
    times: list[float] = []
    memory = _memory()  # before there is a model

    def note(server_round: int, arrays: ArrayRecord) -> None:
        times.append(time.time())  # before the first round, and at the end of each

    model = np.zeros(int(config["parameters"]), np.float32)
    strategy = FedAvg(
        fraction_evaluate=float(config["evaluate"]),
        min_train_nodes=sites,
        min_evaluate_nodes=sites if config["evaluate"] else 0,
        min_available_nodes=sites,
    )
    initial = ArrayRecord({"model": Array(model)})
    result = strategy.start(grid, initial, num_rounds=int(config["rounds"]), evaluate_fn=note)
    moved = float(result.arrays["model"].numpy()[-1])
    Path(str(config["report"])).write_text(json.dumps({"times": times, "memory": memory, "moved": moved}))


@client.train()
def train(message: Message, context: Context) -> Message:
    arrays = message.content["arrays"]
    assert isinstance(arrays, ArrayRecord)
    model = arrays["model"].numpy() + np.float32(0.5)
    metrics = MetricRecord({"num-examples": 10})
    content = RecordDict({"arrays": ArrayRecord({"model": Array(model)}), "metrics": metrics})
    return Message(content, reply_to=message)


@client.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    arrays = message.content["arrays"]
    assert isinstance(arrays, ArrayRecord)
    first = float(arrays["model"].numpy()[0])
    return Message(
        RecordDict({"metrics": MetricRecord({"num-examples": 10, "loss": first})}), reply_to=message
    )


def _memory() -> int:
    """Anonymous and shared bytes of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssShmem")))
