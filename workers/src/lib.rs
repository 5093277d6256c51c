//! The hands of capx: worker processes that claim jobs, run them and commit
//! what came of it.
//!
//! [`runtime`] is the worker loop, [`handlers`] is what each kind of job
//! does, [`agent`] is the work of a model with its [`journal`], [`tools`] and
//! [`adapters`] are what a step can reach, [`artifacts`] keep what is large, [`egress`] is the one way out of the machine. A handler sees a context, never the
//! database: it cannot enqueue, mark itself done or read other tenants.

pub mod adapters;
pub mod agent;
pub mod artifacts;
pub mod deeds;
mod delivery;
pub mod egress;
pub mod handlers;
pub mod journal;
pub mod mcp;
pub mod runtime;
pub mod sandbox;
pub mod tools;

pub use handlers::Hands;
pub use runtime::{Observer, Worker, WorkerConfig};
