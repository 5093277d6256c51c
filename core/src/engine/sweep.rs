//! What any worker does for the others, all the time: make due timers ready,
//! declare silent sessions dead, take back what they held. There is no
//! leader, no recovery phase, and every statement is guarded.

use std::time::Duration;

use super::{Engine, EngineError};
use crate::failpoint;
use crate::store::{jobs, sessions};

/// What a sweep found.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Swept {
    /// Sessions declared dead.
    pub buried: Vec<i64>,
    /// Jobs taken back.
    pub reclaimed: usize,
}

/// One sweep. `base` is the first delay of a job whose worker died.
pub async fn sweep(engine: &Engine, base: Duration) -> Result<Swept, EngineError> {
    if failpoint::reach("sweep.before").await {
        return Ok(Swept::default());
    }
    let buried = sessions::bury(&engine.pool).await?;
    if !buried.is_empty() {
        failpoint::reach("sweep.buried").await;
    }
    let reclaimed = jobs::reclaim(&engine.pool, base).await?;
    if !reclaimed.is_empty() {
        failpoint::reach("sweep.after_commit").await;
    }
    for job in &reclaimed {
        tracing::warn!(job.id = job.job, job.crash_count = job.crash_count, "took a job back from a dead worker");
    }
    Ok(Swept { buried, reclaimed: reclaimed.len() })
}
