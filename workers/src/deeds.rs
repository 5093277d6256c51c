//! What an attempt does inside its company, by the engine.

use capx_core::domain::outcome::Failure;
use capx_core::engine::Engine;
use capx_core::engine::deeds::{self, Doer};
use serde_json::{Map, Value};

use crate::runtime::Watchdog;

/// Who does what inside the company, and by which way.
#[derive(Debug, Clone)]
pub struct Deeds {
    pub(crate) engine: Engine,
    pub(crate) watchdog: Watchdog,
    /// Who; its key is that of the call.
    pub(crate) doer: Doer,
}

impl Deeds {
    /// Does it, once for each key. A task of its own, so that no call of the database is
    /// dropped half-way.
    pub async fn perform(&self, tool: &str, params: Map<String, Value>, key: String) -> Result<Value, Failure> {
        let Self { engine, watchdog, doer } = self.clone();
        let (doer, tool) = (Doer { key, ..doer }, tool.to_owned());
        let done = tokio::spawn(async move {
            watchdog.answer("a deed", Box::pin(deeds::perform(&engine, &doer, &tool, &params))).await
        });
        done.await.unwrap_or_else(|error| Err(Failure::transient(format!("a task ended early: {error}"))))
    }
}
