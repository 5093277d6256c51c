//! Deliveries: what a claimed one needs, and what comes of its tries, for many at once.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use chrono::{DateTime, Utc};
use serde_json::json;
use sqlx::PgConnection;
use uuid::Uuid;

use super::{Engine, EngineError, FieldProblem, repeating};
use crate::domain::delivery::{Answer, FAILING_MAX, Sign, Told, Verdict};
use crate::domain::event::{Event, WEBHOOK_DISABLED, matches};
use crate::domain::flow::Flow;
use crate::domain::ids::{AccountId, CompanyId, DeliveryId, EventId, RunId, WebhookId};
use crate::failpoint;
use crate::store::StoreError;
use crate::store::deliveries::{self, DeliveryFilter, FlowChange, FlowRow, NewDelivery, SendRow, Tried};
use crate::store::events::{FeedFilter, Place};
use crate::store::jobs::{ClaimedJob, millis};
use crate::store::{events, webhooks};

/// What is to be done about a claimed delivery.
#[derive(Debug)]
pub enum Look {
    /// It is sent.
    Send(Box<Sending>),
    /// It has to wait, at no cost.
    Wait(Duration),
    /// Its webhook is disabled.
    Disabled(WebhookId),
}

/// What a try needs.
#[derive(Debug)]
pub struct Sending {
    /// Where to.
    pub webhook: WebhookId,
    /// Which delivery.
    pub delivery: DeliveryId,
    /// Where to.
    pub url: String,
    /// What is told.
    pub told: Told,
    /// What signs; the one before it does too for a while.
    pub secrets: Vec<Vec<u8>>,
    /// The time of this try, in seconds since 1970: the database's.
    pub now_s: i64,
    /// Whether one more success changes nothing of what is known of the webhook.
    at_its_best: bool,
    /// The event is no longer kept: there is nothing to send.
    pub is_gone: bool,
    /// Whether others wait for this one.
    is_ordered: bool,
}

/// A delivery that has to wait for one before it, or for its budget, looks again after this, and
/// somebody who knows better wakes it.
const WAIT: Duration = Duration::from_secs(5);
/// But no sooner than this after the one before it is due.
const BEHIND: Duration = Duration::from_millis(500);
/// A delivery of a disabled webhook looks again after this.
pub const DISABLED_LOOK: Duration = Duration::from_secs(3600);

fn flow_of(row: &FlowRow) -> Flow {
    Flow {
        bears: row.bears,
        failures: row.failures,
        opened: row.opened,
        error_rate: row.error_rate,
        retry_budget: row.retry_budget,
    }
}

fn seconds(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds.max(0.0)).unwrap_or(Duration::MAX)
}

/// Looks at claimed deliveries. One that is not in the answer is over.
pub async fn look(engine: &Engine, jobs: &[&ClaimedJob]) -> Result<HashMap<i64, Look>, EngineError> {
    let known: Vec<(Uuid, Uuid, i64)> =
        jobs.iter().filter_map(|job| Some((job.flow, job.ref_id?, job.lease.job))).collect();
    let (webhooks, (ids, numbers)): (Vec<Uuid>, (Vec<Uuid>, Vec<i64>)) =
        known.iter().map(|(webhook, id, job)| (*webhook, (*id, *job))).unzip();
    let rows = deliveries::load(&engine.pool, &webhooks, &ids, &numbers).await?;
    let by_job: HashMap<i64, &ClaimedJob> = jobs.iter().map(|job| (job.lease.job, *job)).collect();
    let mut retries: HashMap<Uuid, usize> = HashMap::new();
    let mut looks = HashMap::new();
    for row in rows.into_iter().filter(|row| row.is_pending) {
        let Some(job) = by_job.get(&row.job) else { continue };
        looks.insert(row.job, judge(row, job, &mut retries));
    }
    Ok(looks)
}

/// What is to be done about one; `retries` are how many more a webhook may have of them.
fn judge(row: SendRow, job: &ClaimedJob, retries: &mut HashMap<Uuid, usize>) -> Look {
    let webhook = WebhookId(row.flow.webhook_id);
    if !row.is_active {
        return Look::Disabled(webhook);
    }
    if let Some(due) = row.behind_s {
        return Look::Wait(seconds(due).saturating_add(BEHIND).min(WAIT * 12).mul_f64(rand::random_range(1.0..1.5)));
    }
    let flow = flow_of(&row.flow);
    // A probe goes whatever it is.
    if job.attempt > 1 && row.flow.bears > 1 {
        let left = retries.entry(webhook.0).or_insert_with(|| flow.retries(seconds(row.flow.noted_s)));
        match left.checked_sub(1) {
            Some(less) => *left = less,
            None => return Look::Wait(WAIT.mul_f64(rand::random_range(1.0..3.0))),
        }
    }
    let is_gone = row.data.is_none();
    let told = Told {
        event: EventId(row.event_id),
        name: row.event,
        company: CompanyId(row.company_id),
        run: row.run_id.map(RunId),
        at: row.at,
        data: row.data.unwrap_or_default(),
    };
    Look::Send(Box::new(Sending {
        webhook,
        delivery: DeliveryId(job.ref_id.unwrap_or_default()),
        url: row.url,
        told,
        secrets: std::iter::once(row.secret).chain(row.old_secret).collect(),
        now_s: row.now_s,
        is_gone,
        is_ordered: row.is_ordered,
        at_its_best: row.flow.failing_s.is_none() && flow.is_at_its_best(),
    }))
}

/// A try that is over.
#[derive(Debug)]
pub struct Sent {
    /// Its job.
    pub job: ClaimedJob,
    /// What it was.
    pub sending: Box<Sending>,
    /// What came of it.
    pub answer: Answer,
    /// How long it took.
    pub took: Duration,
    /// How the answer begins.
    pub said: Option<String>,
    /// What went wrong.
    pub error: Option<String>,
}

impl Sent {
    fn tried(&self) -> (Tried, Verdict) {
        let tries = u32::try_from(self.job.attempt).unwrap_or(1);
        let verdict = self.answer.verdict(tries, rand::random());
        let (status, delay, given_up) = match verdict {
            Verdict::Succeeded => ("succeeded", None, None),
            Verdict::Again(delay) => ("pending", Some(millis(delay)), None),
            Verdict::Gone => ("failed", None, Some("invalid")),
            Verdict::Failed if self.answer == Answer::Refused => ("failed", None, Some("invalid")),
            Verdict::Failed => ("failed", None, Some("exhausted")),
        };
        let answered = match self.answer {
            Answer::Status(status, _) => Some(i32::from(status)),
            Answer::None | Answer::Refused => None,
        };
        let tried = Tried {
            lease: self.job.lease,
            webhook: self.sending.webhook,
            delivery: self.sending.delivery,
            company: self.job.company,
            status,
            delay_ms: delay,
            answered,
            latency_ms: i32::try_from(self.took.as_millis()).unwrap_or(i32::MAX),
            answer: self.said.clone(),
            error: self.error.clone(),
            given_up,
        };
        (tried, verdict)
    }
}

/// A webhook that is sent to no more.
struct Disabled {
    webhook: WebhookId,
    company: CompanyId,
    reason: String,
}

/// Writes tries, under the leases of their jobs; says which held.
pub async fn commit(engine: &Engine, sent: &[Sent]) -> Result<Vec<i64>, EngineError> {
    if failpoint::reach("delivery.before_commit").await {
        return Err(StoreError::Unavailable(sqlx::Error::PoolClosed).into());
    }
    let (tried, verdicts): (Vec<Tried>, Vec<Verdict>) = sent.iter().map(Sent::tried).unzip();
    let held = repeating(|| write(engine, sent, &tried, &verdicts)).await?;
    failpoint::reach("delivery.after_commit").await;
    Ok(held)
}

async fn write(engine: &Engine, sent: &[Sent], tried: &[Tried], verdicts: &[Verdict]) -> Result<Vec<i64>, EngineError> {
    let mut tx = engine.pool.begin().await?;
    let mut notable: Vec<Uuid> = sent
        .iter()
        .filter(|sent| !sent.sending.at_its_best || sent.answer.sign() != Sign::Well)
        .map(|sent| sent.sending.webhook.0)
        .collect();
    notable.sort_unstable();
    notable.dedup();
    // Before the jobs, as claims do; what is noted is what held.
    let flows = if notable.is_empty() { Vec::new() } else { deliveries::lock_flows(&mut tx, &notable).await? };
    let held = deliveries::settle(&mut tx, tried).await?;
    let ours: HashSet<i64> = held.iter().copied().collect();
    let mine: Vec<(&Sent, Verdict)> = sent
        .iter()
        .zip(verdicts.iter().copied())
        .filter(|(sent, _)| ours.contains(&sent.job.lease.job) && !sent.sending.is_gone)
        .collect();
    let (changes, gone): (Vec<FlowChange>, Vec<Option<Disabled>>) =
        flows.into_iter().filter_map(|row| note(row, &mine)).unzip();
    if !changes.is_empty() {
        deliveries::write_flows(&mut tx, &changes).await?;
    }
    let over = tried.iter().filter(|tried| tried.delay_ms.is_none() && ours.contains(&tried.lease.job));
    let (of, jobs): (Vec<Uuid>, Vec<i64>) = over.map(|tried| (tried.webhook.0, tried.lease.job)).unzip();
    if sent.iter().any(|sent| sent.sending.is_ordered) {
        deliveries::next_in_order(&mut tx, &of, &jobs).await?;
    }
    for Disabled { webhook, company, reason } in gone.into_iter().flatten() {
        if webhooks::disable(&mut tx, webhook, &reason).await? {
            let told = json!({"webhook_id": webhook, "reason": reason});
            events::append(&mut *tx, company, &[Event::new(WEBHOOK_DISABLED, told)]).await?;
        }
    }
    tx.commit().await?;
    Ok(held)
}

/// What is known of a webhook after its tries, and whether it is sent to no more; nothing where it had
/// none.
fn note(row: FlowRow, sent: &[(&Sent, Verdict)]) -> Option<(FlowChange, Option<Disabled>)> {
    let of: Vec<&(&Sent, Verdict)> = sent.iter().filter(|(sent, _)| sent.sending.webhook.0 == row.webhook_id).collect();
    if of.is_empty() {
        return None;
    }
    let mut flow = flow_of(&row);
    flow.wait(seconds(row.noted_s));
    let (mut is_open, mut opens, mut disabled) = (row.is_open, None, None);
    // Whatever else was in the same batch: something works.
    let worked = of.iter().any(|(_, verdict)| *verdict == Verdict::Succeeded);
    for (sent, verdict) in of {
        let opened = flow.note(sent.answer.sign(), sent.job.attempt > 1, is_open, rand::random());
        is_open |= opened.is_some();
        opens = opened.or(opens);
        let said = sent.error.as_deref().unwrap_or_default();
        let failing = row.failing_s.is_some_and(|failing| failing >= FAILING_MAX.as_secs_f64());
        let reason = match verdict {
            Verdict::Gone => Some("it answered 410 Gone: it wants no more".to_owned()),
            Verdict::Succeeded => None,
            _ if failing && !worked => Some(format!("nothing has worked for 5 days: {said}")),
            _ => None,
        };
        if let Some(reason) = reason {
            disabled = Some(Disabled { webhook: sent.sending.webhook, company: sent.job.company, reason });
        }
    }
    if flow.opened == 0 {
        opens = None;
    }
    let row = FlowRow {
        bears: flow.bears,
        failures: flow.failures,
        opened: flow.opened,
        error_rate: flow.error_rate,
        retry_budget: flow.retry_budget,
        ..row
    };
    Some((FlowChange { flow: row, opens_ms: opens.map(millis), worked }, disabled))
}

/// Which deliveries are sent again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Which {
    /// Those that were given up.
    Failed,
    /// Those that were never made.
    Missing,
    /// All that there are.
    All,
}

/// Deliveries to be sent again.
#[derive(Debug)]
pub struct Resend<'a> {
    /// Where to.
    pub webhook: WebhookId,
    /// Whose the webhook is.
    pub account: AccountId,
    /// It is told of this company alone.
    pub company: Option<CompanyId>,
    /// What it is told of.
    pub patterns: &'a [String],
    /// Which.
    pub which: Which,
    /// Of events that this pattern takes in.
    pub event: Option<&'a str>,
    /// Of events at this time or later.
    pub since: Option<DateTime<Utc>>,
    /// Of events before this time.
    pub until: Option<DateTime<Utc>>,
    /// Where the request before has got to.
    pub cursor: Option<&'a str>,
    /// How many are looked at.
    pub limit: i64,
}

/// Sends deliveries again, in the caller's transaction, who wakes workers after it: says how many, and
/// where to go on.
pub async fn resend(tx: &mut PgConnection, resend: &Resend<'_>) -> Result<(usize, Option<String>), EngineError> {
    if resend.which == Which::Missing { missing(tx, resend).await } else { again(tx, resend).await }
}

fn wrong_cursor() -> EngineError {
    EngineError::Invalid(vec![FieldProblem::new("cursor", "must be the `cursor` of an answer to the same request")])
}

async fn again(tx: &mut PgConnection, resend: &Resend<'_>) -> Result<(usize, Option<String>), EngineError> {
    let beyond = resend.cursor.map(|text| Uuid::try_parse(text).map_err(|_| wrong_cursor())).transpose()?;
    let filter = DeliveryFilter {
        status: (resend.which == Which::Failed).then_some("failed"),
        event: resend.event,
        since: resend.since.map(deliveries::least_id),
        until: resend.until.map(deliveries::least_id),
        beyond,
    };
    let (rows, next) = deliveries::list(tx, resend.webhook, filter, resend.limit).await?;
    let ids: Vec<Uuid> = rows.iter().map(|row| row.id).collect();
    let sent = deliveries::redeliver(tx, resend.webhook, &ids).await?;
    Ok((sent.len(), next.map(|id| id.simple().to_string())))
}

async fn missing(tx: &mut PgConnection, resend: &Resend<'_>) -> Result<(usize, Option<String>), EngineError> {
    let place = |text: &str| {
        let (xid, id) = text.split_once('-')?;
        Some(Place { xid: xid.parse().ok()?, id: Uuid::try_parse(id).ok()? })
    };
    let after = resend.cursor.map(|text| place(text).ok_or_else(wrong_cursor)).transpose()?;
    let filter = FeedFilter {
        account: resend.account,
        company: resend.company,
        kinds: None,
        agent: None,
        since: resend.since,
        before: resend.until,
        after,
    };
    let rows = events::feed(tx, filter, false, resend.limit).await?;
    let next = (i64::try_from(rows.len()).is_ok_and(|found| found == resend.limit))
        .then(|| rows.last().map(|row| format!("{}-{}", row.place.xid, row.place.id.simple())))
        .flatten();
    let mut made = 0;
    for row in rows {
        let name = &row.event.event;
        let told = resend.patterns.iter().any(|pattern| matches(pattern, name));
        let wanted = told && resend.event.is_none_or(|one| matches(one, name));
        if wanted {
            let new = NewDelivery {
                company: row.company,
                event: name,
                event_id: row.event.id.0,
                xid: Some(row.place.xid),
                data: None,
            };
            made += usize::from(deliveries::insert(tx, resend.webhook, &new).await?.1);
        }
    }
    Ok((made, next))
}
