import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from .model import chance, gradient

app = ClientApp()


def table(context):
    rows = np.loadtxt(context.node_config["data"], delimiter=",", skiprows=1)
    return np.column_stack([rows[:, :2], np.ones(len(rows))]), rows[:, 2]


@app.train()
def train(message, context):
    inputs, targets = table(context)
    weights = message.content["arrays"]["weights"].numpy()
    for _ in range(20):
        weights = weights - message.content["config"]["lr"] * gradient(weights, inputs, targets)
    rounds = context.state.get("rounds", MetricRecord({"done": 0}))["done"] + 1
    context.state["rounds"] = MetricRecord({"done": rounds})
    content = RecordDict(
        {
            "arrays": ArrayRecord({"weights": Array(weights)}),
            "metrics": MetricRecord({"num-examples": len(targets), "rounds": rounds}),
        }
    )
    return Message(content, reply_to=message)


@app.evaluate()
def evaluate(message, context):
    inputs, targets = table(context)
    right = (chance(message.content["arrays"]["weights"].numpy(), inputs) > 0.5) == targets
    metrics = MetricRecord({"num-examples": len(targets), "accuracy": float(right.mean())})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)
