//! What workers do for all from time to time, besides the sweep: sums are folded, marks are set, what
//! is old goes, what was parked in vain goes on. Each part is a row that one worker claims; one that
//! does not work holds up no other, and says so.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use uuid::Uuid;

use super::{Engine, EngineError, agents, asks, gates, redrives, spending, triggers};
use crate::domain::retention::{Kept, days};
use crate::store::upkeep::{self as store, Claimed};
use crate::store::{deliveries, events, fleet, hooks, idempotency, jobs, months, sessions, signals, usage, webhooks};

/// The parts, and how often each is due. All of them may be done twice, or by two at once.
const PARTS: &[(&str, Duration)] = &[
    ("sums", Duration::from_secs(20)),
    ("marks", Duration::from_secs(60)),
    ("triggers", Duration::from_secs(20)),
    ("reminders", Duration::from_secs(20)),
    ("task_reminders", Duration::from_secs(20)),
    ("unheard_calls", Duration::from_secs(20)),
    ("budget_periods", Duration::from_secs(20)),
    ("parked", Duration::from_secs(20)),
    ("priorities", fleet::AGE),
    ("enabled_webhooks", Duration::from_secs(20)),
    ("redrives", Duration::from_secs(1)),
    ("prune", Duration::from_secs(60)),
    ("runs", Duration::from_secs(300)),
    ("activity", Duration::from_secs(300)),
    ("deliveries", Duration::from_secs(300)),
    ("months", Duration::from_secs(3600)),
];
/// The parts that are looked for more often than a sweep comes.
const SOON: &[&str] = &["redrives"];
/// So long one claim of a part lets old things go, and so long a round claims parts: what is left comes
/// soon, in another.
const PART_MAX: Duration = Duration::from_secs(5);
const ROUND_MAX: Duration = Duration::from_secs(20);

/// What a part came to: where it goes on, and whether there is more to do at once.
#[derive(Debug, Default)]
struct Went {
    place: Option<Uuid>,
    soon: bool,
}

/// Does the parts that are due, each once; says how many did not work.
pub async fn round(engine: &Engine) -> Result<usize, EngineError> {
    store::know(&engine.pool, PARTS).await?;
    claimed(engine, PARTS).await
}

/// The same of those that do not wait for a round.
pub async fn soon(engine: &Engine) -> Result<usize, EngineError> {
    let parts: Vec<(&str, Duration)> = PARTS.iter().copied().filter(|(part, _)| SOON.contains(part)).collect();
    store::know(&engine.pool, &parts).await?;
    claimed(engine, &parts).await
}

async fn claimed(engine: &Engine, parts: &[(&str, Duration)]) -> Result<usize, EngineError> {
    let mut failed = 0;
    let began = Instant::now();
    for _ in 0..2 * parts.len() {
        if began.elapsed() >= ROUND_MAX {
            break;
        }
        let Some(claimed) = store::claim(&engine.pool, parts).await? else { break };
        let (went, error) = match part(engine, &claimed).await {
            Ok(went) => (went, None),
            Err(error) => {
                failed += 1;
                tracing::warn!(%error, part = claimed.part, "a part of the upkeep did not work");
                (Went { place: claimed.place, soon: false }, Some(error.to_string()))
            }
        };
        store::done(&engine.pool, &claimed, went.place, went.soon, error.as_deref()).await?;
    }
    Ok(failed)
}

/// Does every part now, due or not: for tests, and for whoever wants it done.
///
/// # Errors
/// The first that came; the other parts were done all the same.
pub async fn all(engine: &Engine) -> Result<(), EngineError> {
    let mut first = Ok(());
    for (name, _) in PARTS {
        let claimed = Claimed { part: (*name).to_owned(), epoch: 0, place: None };
        if let Err(error) = part(engine, &claimed).await
            && first.is_ok()
        {
            first = Err(error);
        }
    }
    first
}

async fn part(engine: &Engine, claimed: &Claimed) -> Result<Went, EngineError> {
    match claimed.part.as_str() {
        "sums" => {
            while usage::fold_runs(&engine.pool).await? == usage::FOLD_MAX as u64 {}
            while usage::fold_costs(&engine.pool).await? == usage::FOLD_MAX as u64 {}
        }
        "marks" => events::mark(&engine.pool).await?,
        "triggers" => triggers::catch_up(engine).await?,
        "reminders" => gates::remind(engine).await?,
        "task_reminders" => asks::look(engine).await?,
        "unheard_calls" => spending::settle_unheard(engine).await?,
        "budget_periods" => agents::periods_over(engine).await?,
        "parked" => parked(engine).await?,
        "priorities" => _ = fleet::age(&engine.pool).await?,
        "enabled_webhooks" => while webhooks::unhold_enabled(&engine.pool).await? == webhooks::UNHOLD_MAX as u64 {},
        "redrives" => redrives::step(engine).await?,
        "prune" => {
            while signals::prune(&engine.pool).await? == signals::PRUNE_MAX as u64 {}
            while hooks::prune(&engine.pool).await? == hooks::PRUNE_MAX as u64 {}
            while idempotency::prune(&engine.pool).await? == idempotency::PRUNE_MAX as u64 {}
            sessions::prune(&engine.pool).await?;
        }
        "runs" => return old_runs(engine, claimed.place).await,
        "activity" => return old_activity(engine, claimed.place).await,
        "deliveries" => return old_deliveries(engine, claimed.place).await,
        "months" => cut_months(engine).await?,
        _ => {}
    }
    Ok(Went::default())
}

/// Work of companies that are not paused, and that was parked all the same.
async fn parked(engine: &Engine) -> Result<(), EngineError> {
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

/// How long each thing is kept.
pub async fn retention(connection: &mut sqlx::PgConnection) -> Result<HashMap<Kept, i32>, EngineError> {
    let set: HashMap<String, i32> = store::retention(connection).await?.into_iter().collect();
    let of = |kept: Kept| set.get(kept.as_str()).copied().unwrap_or_else(|| kept.default_days()).max(kept.least_days());
    Ok(Kept::ALL.into_iter().map(|kept| (kept, of(kept))).collect())
}

async fn kept(engine: &Engine) -> Result<impl Fn(Kept) -> Duration, EngineError> {
    let mut connection = engine.pool.acquire().await?;
    let set = retention(&mut connection).await?;
    Ok(move |kept: Kept| days(set.get(&kept).copied().unwrap_or_else(|| kept.default_days())))
}

/// Runs that were over long ago go, from where the last turn has got to; from the first one again
/// once there are no more.
async fn old_runs(engine: &Engine, from: Option<Uuid>) -> Result<Went, EngineError> {
    let keep = kept(engine).await?;
    let (mut place, began) = (from, Instant::now());
    while began.elapsed() < PART_MAX {
        let went = store::forget_runs(&engine.pool, place, keep(Kept::Runs), keep(Kept::FailedRuns)).await?;
        place = went.place;
        if place.is_none() {
            return Ok(Went::default());
        }
    }
    Ok(Went { place, soon: true })
}

/// Events that belong to no run and happened long ago go, company by company.
async fn old_activity(engine: &Engine, from: Option<Uuid>) -> Result<Went, EngineError> {
    let keep = kept(engine).await?(Kept::Activity);
    let (mut place, began) = (from, Instant::now());
    while began.elapsed() < PART_MAX {
        let Some(company) = store::next_company(&engine.pool, place).await? else {
            // A time is looked up among marks that are older than what is kept.
            store::forget_marks(&engine.pool, keep + days(400)).await?;
            return Ok(Went::default());
        };
        if store::forget_events(&engine.pool, company, keep).await? < store::EVENTS_MAX as u64 {
            place = Some(company);
        }
    }
    Ok(Went { place, soon: true })
}

/// So many months of a table one claim drops.
const MONTHS_MAX: usize = 24;

/// Months are made ahead, and those that are over and hold nothing any more are dropped. A table that
/// somebody holds keeps none of the others from it.
async fn cut_months(engine: &Engine) -> Result<(), EngineError> {
    let mut first = Ok(());
    for whole in months::WHOLES {
        let mut cut = months::make(&engine.pool, whole).await.map(|_| ());
        for _ in 0..MONTHS_MAX {
            match months::drop_oldest(&engine.pool, whole).await {
                Ok(Some(month)) => tracing::info!(month, "dropped a month of history"),
                Ok(None) => break,
                Err(error) => {
                    cut = cut.and(Err(error));
                    break;
                }
            }
        }
        first = first.and(cut);
    }
    Ok(first?)
}

/// Deliveries that were over long ago go, and all of webhooks that are gone: webhook by webhook.
async fn old_deliveries(engine: &Engine, from: Option<Uuid>) -> Result<Went, EngineError> {
    let keep = kept(engine).await?;
    let (mut place, began) = (from, Instant::now());
    while began.elapsed() < PART_MAX {
        let Some(webhook) = deliveries::next_webhook(&engine.pool, place).await? else { return Ok(Went::default()) };
        let gone = deliveries::prune(&engine.pool, webhook, keep(Kept::Deliveries), keep(Kept::FailedDeliveries));
        if gone.await? < deliveries::PRUNE_MAX as u64 {
            place = Some(webhook);
        }
    }
    Ok(Went { place, soon: true })
}
