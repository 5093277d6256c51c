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

/// One sweep. `base` is the first delay of a job whose worker died; `bury`,
/// whether silent sessions are declared dead.
pub async fn sweep(engine: &Engine, base: Duration, bury: bool) -> Result<Swept, EngineError> {
    if failpoint::reach("sweep.before").await {
        return Ok(Swept::default());
    }
    let buried = if bury { sessions::bury(&engine.pool).await? } else { Vec::new() };
    if !buried.is_empty() {
        failpoint::reach("sweep.buried").await;
    }
    let mut swept = Swept { buried, reclaimed: 0 };
    loop {
        let reclaimed = jobs::reclaim(&engine.pool, base).await?;
        if !reclaimed.is_empty() {
            failpoint::reach("sweep.after_commit").await;
        }
        for job in &reclaimed {
            tracing::warn!(job.id = job.job, job.crash_count = job.crash_count, "took a job back from a dead worker");
        }
        swept.reclaimed += reclaimed.len();
        // There may be more than one statement takes.
        if reclaimed.len() < jobs::RECLAIM_MAX as usize {
            return Ok(swept);
        }
    }
}
