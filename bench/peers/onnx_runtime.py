"""ONNX Runtime: evaluation, a model of one `BatchNormalization` node, from and to NumPy's memory.

Parameters are constants of the model, as in every exported network. ONNX knows channels-first only. The pool's idle
threads would spin for the next contender to suffer; they are told not to. That costs it nothing here: calls that
follow each other found the pool as fast either way, from (64, 64) to (32, 64, 56, 56).
"""

from typing import Any

import numpy as np
from inputs import EPS, Array, Inputs

import nbbn
from peers.table import Call, Peer


def evaluation(given: Inputs) -> Call | None:
    import onnxruntime

    if given.axis != 1 or given.dtype != np.float32:
        return None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = nbbn.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(_model(given), options, providers=["CPUExecutionProvider"])
    out, binding = given.empty_result(), session.io_binding()
    binding.bind_input("x", "cpu", 0, np.float32, given.x.shape, given.x.ctypes.data)
    binding.bind_output("y", "cpu", 0, np.float32, out.shape, out.ctypes.data)

    def call():
        session.run_with_iobinding(binding)
        return (out,)

    return call


def _model(given: Inputs) -> bytes:
    from onnx import TensorProto, helper, numpy_helper

    def tensor(name: str) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, given.x.shape)

    def constant(name: str, array: Array) -> Any:
        return numpy_helper.from_array(array, name)

    node = helper.make_node(
        "BatchNormalization", ["x", "weight", "bias", "running_mean", "running_var"], ["y"], epsilon=EPS
    )
    names = node.input[1:]
    constants = [constant(name, getattr(given, name)) for name in names]
    graph = helper.make_graph([node], "evaluation", [tensor("x")], [tensor("y")], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=8)
    return model.SerializeToString()


PEER = Peer("ONNX Runtime", "onnxruntime", "onnxruntime", {"evaluation": evaluation})
