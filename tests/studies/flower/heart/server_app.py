import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAdam

app = ServerApp()


@app.main()
def main(grid, context):
    config = context.run_config
    strategy = FedAdam(
        min_train_nodes=2,
        min_evaluate_nodes=2,
        min_available_nodes=2,
        eta=config["server-lr"],
    )
    result = strategy.start(
        grid,
        initial_arrays=ArrayRecord({"weights": Array(np.zeros(3))}),
        num_rounds=config["num-server-rounds"],
        train_config=ConfigRecord({"lr": config["lr"]}),
    )
    context.state["arrays"] = result.arrays
    context.state["metrics"] = MetricRecord({"accuracy": result.evaluate_metrics_clientapp[3]["accuracy"]})
