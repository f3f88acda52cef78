"""A killed LangGraph agent's workflow, recovered with what its peers remember."""

from langgraph_peerctx.config import KafkaConfig, PeerContextSettings
from langgraph_peerctx.drawing import Drawing, draw_incident, draw_recovery, draw_states
from langgraph_peerctx.durability.effects import Settled, current_effect, effect
from langgraph_peerctx.durability.fenced_checkpointer import FencedCheckpointer
from langgraph_peerctx.durability.receiver import AsyncReceipt, Receipt, Receiver
from langgraph_peerctx.durability.recorder import InteractionRecorder
from langgraph_peerctx.errors import (
    BrokerUnavailableError,
    CheckpointerError,
    ConfigurationError,
    InDoubtError,
    PeerContextError,
    ProtocolError,
    RecordRefusedError,
    RecoveryError,
    SendOutcomeUnknownError,
    SentinelRunningError,
    StaleOwnerError,
    StoreBusyError,
    StoreError,
    ThreadBusyError,
    TooFewResponsesError,
    UnknownChannelError,
    UnknownTopicError,
)
from langgraph_peerctx.gathering.peer_context import Conflict, Coverage, Fact, PeerContext
from langgraph_peerctx.lifecycle import PeerContextHook, peer_context_lifespan
from langgraph_peerctx.messaging.agent_context_service import (
    AgentContextService,
    get_service_manager,
)
from langgraph_peerctx.messaging.consumer import KafkaMessageConsumer
from langgraph_peerctx.messaging.context_handler import ContextRequestHandler
from langgraph_peerctx.messaging.embedded_broker import EmbeddedBroker
from langgraph_peerctx.messaging.producer import KafkaMessageProducer
from langgraph_peerctx.nodes.ask_peers_tool import create_ask_peers_tool
from langgraph_peerctx.nodes.peer_context_node import PeerContextNode, peer_context_retry_policy
from langgraph_peerctx.nodes.peer_context_subgraph import create_peer_context_subgraph
from langgraph_peerctx.nodes.state import PeerContextState, merge_peer_context
from langgraph_peerctx.owned import OwnedRun, own_runs, owned
from langgraph_peerctx.persistence.event_store import (
    EventStore,
    arecord_interaction,
    get_event_store,
    record_interaction,
)
from langgraph_peerctx.persistence.incidents import ControlDatabase, Incident
from langgraph_peerctx.persistence.runs import Run
from langgraph_peerctx.protocol.messages import InDoubtKey, Interaction
from langgraph_peerctx.protocol.tickets import EffectTicket
from langgraph_peerctx.reconstruction.answering import aanswer_recovery, answer_recovery
from langgraph_peerctx.reconstruction.evidence import Reconstruction
from langgraph_peerctx.reconstruction.explaining import explain as explain_reconstruction
from langgraph_peerctx.reconstruction.failure_detector import (
    AgentFailure,
    FailureDetector,
    ProcessState,
)
from langgraph_peerctx.reconstruction.incident import IncidentRecord
from langgraph_peerctx.reconstruction.reconstructor import (
    AgentReconstructor,
    recover_and_resume_workflow_async,
)
from langgraph_peerctx.reconstruction.recoverer import SupervisedWorkflow
from langgraph_peerctx.reconstruction.recovery_graph import create_recovery_graph
from langgraph_peerctx.reconstruction.result import RecoveryResult
from langgraph_peerctx.reconstruction.supervisor import RecoverySupervisor
from langgraph_peerctx.runtime import PeerContextRuntime

__all__ = [
    "AgentContextService",
    "AgentFailure",
    "AgentReconstructor",
    "AsyncReceipt",
    "BrokerUnavailableError",
    "CheckpointerError",
    "ConfigurationError",
    "Conflict",
    "ContextRequestHandler",
    "ControlDatabase",
    "Coverage",
    "Drawing",
    "EffectTicket",
    "EmbeddedBroker",
    "EventStore",
    "Fact",
    "FailureDetector",
    "FencedCheckpointer",
    "InDoubtError",
    "InDoubtKey",
    "Incident",
    "IncidentRecord",
    "Interaction",
    "InteractionRecorder",
    "KafkaConfig",
    "KafkaMessageConsumer",
    "KafkaMessageProducer",
    "OwnedRun",
    "PeerContext",
    "PeerContextError",
    "PeerContextHook",
    "PeerContextNode",
    "PeerContextRuntime",
    "PeerContextSettings",
    "PeerContextState",
    "ProcessState",
    "ProtocolError",
    "Receipt",
    "Receiver",
    "Reconstruction",
    "RecordRefusedError",
    "RecoveryError",
    "RecoveryResult",
    "RecoverySupervisor",
    "Run",
    "SendOutcomeUnknownError",
    "SentinelRunningError",
    "Settled",
    "StaleOwnerError",
    "StoreBusyError",
    "StoreError",
    "SupervisedWorkflow",
    "ThreadBusyError",
    "TooFewResponsesError",
    "UnknownChannelError",
    "UnknownTopicError",
    "aanswer_recovery",
    "answer_recovery",
    "arecord_interaction",
    "create_ask_peers_tool",
    "create_peer_context_subgraph",
    "create_recovery_graph",
    "current_effect",
    "draw_incident",
    "draw_recovery",
    "draw_states",
    "effect",
    "explain_reconstruction",
    "get_event_store",
    "get_service_manager",
    "merge_peer_context",
    "own_runs",
    "owned",
    "peer_context_lifespan",
    "peer_context_retry_policy",
    "record_interaction",
    "recover_and_resume_workflow_async",
]
