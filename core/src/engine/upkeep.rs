//! What any worker does for all from time to time, besides the sweep: sums are
//! folded, marks are set, what is old goes, what was parked in vain goes on.

use super::{Engine, EngineError, agents, asks, gates, spending, triggers};
use crate::store::{events, hooks, idempotency, jobs, signals, usage};

/// One round. Each part is one guarded statement, so that workers who do it at
/// once share the work.
pub async fn round(engine: &Engine) -> Result<(), EngineError> {
    while usage::fold_runs(&engine.pool).await? == usage::FOLD_MAX as u64 {}
    while usage::fold_costs(&engine.pool).await? == usage::FOLD_MAX as u64 {}
    events::mark(&engine.pool).await?;
    triggers::catch_up(engine).await?;
    gates::remind(engine).await?;
    asks::look(engine).await?;
    spending::settle_unheard(engine).await?;
    agents::periods_over(engine).await?;
    while signals::prune(&engine.pool).await? == signals::PRUNE_MAX as u64 {}
    while hooks::prune(&engine.pool).await? == hooks::PRUNE_MAX as u64 {}
    while idempotency::prune(&engine.pool).await? == idempotency::PRUNE_MAX as u64 {}
    for company in jobs::parked_in_vain(&engine.pool).await? {
        loop {
            let unparked = jobs::unpark(&engine.pool, company).await?;
            if unparked > 0 {
                engine.waker.wake();
            }
            if unparked < jobs::UNPARK_MAX as u64 {
                break;
            }
        }
    }
    Ok(())
}
