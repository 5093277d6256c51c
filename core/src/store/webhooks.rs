//! Addresses that are told of events.

use chrono::{DateTime, Utc};
use sqlx::{PgConnection, PgPool};
use uuid::Uuid;

use super::StoreError;
use super::jobs::millis;
use crate::domain::ids::{AccountId, CompanyId, WebhookId};

/// How many webhooks an account may have.
pub const WEBHOOKS_MAX: i64 = 100;
/// How long the old secret signs beside a new one.
pub const ROTATION: std::time::Duration = std::time::Duration::from_secs(24 * 3600);

/// A webhook to be.
#[derive(Debug)]
pub struct NewWebhook<'a> {
    /// Its id.
    pub webhook: WebhookId,
    /// Whose.
    pub account: AccountId,
    /// Of one company, or of all.
    pub company: Option<CompanyId>,
    /// Where to.
    pub url: &'a str,
    /// Names of events, or patterns.
    pub events: &'a [String],
    /// For people.
    pub description: Option<&'a str>,
    /// What signs.
    pub secret: [u8; 32],
    /// Its events about one thing go one after another.
    pub ordered: bool,
    /// What bounds it.
    pub limits: Limits,
}

/// How much a webhook is sent at the most.
#[derive(Debug, Clone, Copy, Default)]
pub struct Limits {
    /// So many a second.
    pub rate: Option<f64>,
    /// So many at once.
    pub at_once: Option<i32>,
}

/// A webhook as people read it: without its secret.
#[derive(Debug, Clone)]
pub struct WebhookRow {
    /// Which.
    pub id: Uuid,
    /// Of one company, or of all.
    pub company_id: Option<Uuid>,
    /// Where to.
    pub url: String,
    /// Names of events, or patterns.
    pub events: Vec<String>,
    /// For people.
    pub description: Option<String>,
    /// `active` or `disabled`.
    pub status: String,
    /// Why it is disabled.
    pub disabled_reason: Option<String>,
    /// Its events about one thing go one after another.
    pub ordered: bool,
    /// So many a second at the most.
    pub rate: Option<f64>,
    /// So many at once at the most.
    pub max_running: Option<i32>,
    /// Until when nothing is sent, since nothing works.
    pub open_until: Option<DateTime<Utc>>,
    /// Nothing has worked since.
    pub failing_since: Option<DateTime<Utc>>,
    /// When it was made.
    pub created_at: DateTime<Utc>,
    /// When it last changed.
    pub updated_at: DateTime<Utc>,
}

/// Stores a webhook; `None` when the account has as many as it may.
pub async fn insert(tx: &mut PgConnection, new: &NewWebhook<'_>) -> Result<Option<WebhookRow>, StoreError> {
    // Under a lock of its own, so that two at once do not both fit: the
    // account's row is the meter's.
    sqlx::query!(
        "select pg_advisory_xact_lock(hashtextextended('webhooks of ' || $1::text, 0))",
        new.account.0.to_string()
    )
    .fetch_one(&mut *tx)
    .await?;
    let made = sqlx::query!(
        "insert into webhooks (id, account_id, company_id, url, events, description, secret, ordered)
         select $1, $2, $3, $4, $5, $6, $7, $9
         where (select count(*) from webhooks where account_id = $2) < $8",
        new.webhook.0,
        new.account.0,
        new.company.map(|company| company.0),
        new.url,
        new.events,
        new.description,
        &new.secret[..],
        WEBHOOKS_MAX,
        new.ordered,
    )
    .execute(&mut *tx)
    .await?;
    if made.rows_affected() == 0 {
        return Ok(None);
    }
    sqlx::query!(
        "update flows set rate = $2, max_running = $3 where queue = 'webhooks' and flow_id = $1",
        new.webhook.0,
        new.limits.rate,
        new.limits.at_once,
    )
    .execute(&mut *tx)
    .await?;
    get(tx, (new.account, None), new.webhook).await
}

/// Whose webhooks are asked for: of an account, and of one company where the
/// caller is bound to it.
pub type Owner = (AccountId, Option<CompanyId>);

/// A page of an account's webhooks, newest first.
pub async fn list(
    tx: &mut PgConnection,
    (account, bound): Owner,
    before: Option<Uuid>,
    limit: i64,
) -> Result<Vec<WebhookRow>, StoreError> {
    Ok(sqlx::query_as!(
        WebhookRow,
        "select w.id, w.company_id, w.url, w.events, w.description, w.status, w.disabled_reason, w.ordered, f.rate as \"rate?\",
             f.max_running, case when f.open_until > now() then f.open_until end as open_until, f.failing_since,
             w.created_at, w.updated_at
         from webhooks w left join flows f on f.queue = 'webhooks' and f.webhook_id = w.id
         where w.account_id = $1 and ($2::uuid is null or w.company_id = $2) and ($3::uuid is null or w.id < $3)
         order by w.id desc limit $4",
        account.0,
        bound.map(|company| company.0),
        before,
        limit,
    )
    .fetch_all(tx)
    .await?)
}

/// One webhook.
pub async fn get(
    tx: &mut PgConnection,
    (account, bound): Owner,
    webhook: WebhookId,
) -> Result<Option<WebhookRow>, StoreError> {
    Ok(sqlx::query_as!(
        WebhookRow,
        "select w.id, w.company_id, w.url, w.events, w.description, w.status, w.disabled_reason, w.ordered, f.rate as \"rate?\",
             f.max_running, case when f.open_until > now() then f.open_until end as open_until, f.failing_since,
             w.created_at, w.updated_at
         from webhooks w left join flows f on f.queue = 'webhooks' and f.webhook_id = w.id
         where w.id = $1 and w.account_id = $2 and ($3::uuid is null or w.company_id = $3)",
        webhook.0,
        account.0,
        bound.map(|company| company.0),
    )
    .fetch_optional(tx)
    .await?)
}

/// What changes of a webhook; what is `None` stays.
#[derive(Debug, Default)]
pub struct Change<'a> {
    /// Where to.
    pub url: Option<&'a str>,
    /// Names of events, or patterns.
    pub events: Option<&'a [String]>,
    /// For people.
    pub description: Option<&'a str>,
    /// Whether it is told of events.
    pub active: Option<bool>,
    /// Whether its events about one thing go one after another.
    pub ordered: Option<bool>,
    /// So many a second; `Some(None)`: no more than its answers allow.
    pub rate: Option<Option<f64>>,
    /// So many at once; `Some(None)`: no more than its answers allow.
    pub at_once: Option<Option<i32>>,
}

/// Changes a webhook of an account.
pub async fn update(
    tx: &mut PgConnection,
    (account, bound): Owner,
    webhook: WebhookId,
    change: &Change<'_>,
) -> Result<Option<WebhookRow>, StoreError> {
    lock_flow(tx, webhook).await?;
    let done = sqlx::query!(
        "update webhooks
         set url = coalesce($4, url), events = coalesce($5, events), description = coalesce($6, description),
             status = case $7::boolean when true then 'active' when false then 'disabled' else status end,
             disabled_reason = case $7 when true then null when false then 'disabled by hand' else disabled_reason end,
             ordered = coalesce($8, ordered), updated_at = now()
         where id = $1 and account_id = $2 and ($3::uuid is null or company_id = $3)",
        webhook.0,
        account.0,
        bound.map(|company| company.0),
        change.url,
        change.events,
        change.description,
        change.active,
        change.ordered,
    )
    .execute(&mut *tx)
    .await?;
    if done.rows_affected() == 0 {
        return Ok(None);
    }
    if change.rate.is_some() || change.at_once.is_some() {
        sqlx::query!(
            "update flows
             set rate = case when $2 then $3 else rate end, max_running = case when $4 then $5 else max_running end
             where queue = 'webhooks' and flow_id = $1",
            webhook.0,
            change.rate.is_some(),
            change.rate.flatten(),
            change.at_once.is_some(),
            change.at_once.flatten(),
        )
        .execute(&mut *tx)
        .await?;
    }
    get(tx, (account, bound), webhook).await
}

/// Gives a webhook another secret; the one that it had signs too for
/// [`ROTATION`].
pub async fn rotate(
    tx: &mut PgConnection,
    (account, bound): Owner,
    webhook: WebhookId,
    secret: [u8; 32],
) -> Result<Option<WebhookRow>, StoreError> {
    let done = sqlx::query!(
        "update webhooks
         set old_secret = secret, old_secret_until = now() + $5::bigint * interval '1 millisecond', secret = $4,
             updated_at = now()
         where id = $1 and account_id = $2 and ($3::uuid is null or company_id = $3)",
        webhook.0,
        account.0,
        bound.map(|company| company.0),
        &secret[..],
        millis(ROTATION),
    )
    .execute(&mut *tx)
    .await?;
    if done.rows_affected() == 0 {
        return Ok(None);
    }
    get(tx, (account, bound), webhook).await
}

/// Deletes a webhook of an account; false when it has none such.
pub async fn delete(tx: &mut PgConnection, (account, bound): Owner, webhook: WebhookId) -> Result<bool, StoreError> {
    lock_flow(tx, webhook).await?;
    let done = sqlx::query!(
        "delete from webhooks where id = $1 and account_id = $2 and ($3::uuid is null or company_id = $3)",
        webhook.0,
        account.0,
        bound.map(|company| company.0),
    )
    .execute(tx)
    .await?;
    Ok(done.rows_affected() == 1)
}

/// A webhook is sent to no more; false when it is disabled already, or gone.
pub async fn disable(tx: &mut PgConnection, webhook: WebhookId, reason: &str) -> Result<bool, StoreError> {
    let done = sqlx::query!(
        "update webhooks set status = 'disabled', disabled_reason = $2, updated_at = now()
         where id = $1 and status = 'active'",
        webhook.0,
        reason,
    )
    .execute(tx)
    .await?;
    Ok(done.rows_affected() == 1)
}

/// Locks a webhook's flow, which everybody locks before the webhook.
async fn lock_flow(tx: &mut PgConnection, webhook: WebhookId) -> Result<(), StoreError> {
    sqlx::query!("select from flows where queue = 'webhooks' and flow_id = $1 for update", webhook.0)
        .execute(tx)
        .await?;
    Ok(())
}

/// How many held deliveries one statement lets go.
pub const UNHOLD_MAX: i64 = 1_000;

/// Nothing that a webhook did before it was enabled is held against it, and deliveries that waited for
/// that are due: so many of them, and the rest by [`unhold_enabled`].
pub async fn unhold(tx: &mut PgConnection, webhook: WebhookId) -> Result<(), StoreError> {
    sqlx::query!(
        "update flows set failures = 0, opened = 0, open_until = null, failing_since = null
         where queue = 'webhooks' and flow_id = $1",
        webhook.0,
    )
    .execute(&mut *tx)
    .await?;
    sqlx::query!(
        "update jobs set held_for = null, due_at = now(), state = 'ready'
         where id = any (array(
             -- One that is locked is under way, and looks for itself.
             select id from jobs where held_for = $1 and state = 'scheduled' limit $2 for update skip locked))",
        webhook.0,
        UNHOLD_MAX,
    )
    .execute(tx)
    .await?;
    Ok(())
}

/// Deliveries that wait for webhooks which are enabled are due; says how many.
pub async fn unhold_enabled(pool: &PgPool) -> Result<u64, StoreError> {
    let done = sqlx::query!(
        "update jobs set held_for = null, due_at = now(), state = 'ready'
         where id = any (array(
             select j.id from webhooks w
             cross join lateral (
                 select j.id from jobs j where j.held_for = w.id and j.state = 'scheduled' limit $1
                 for update skip locked
             ) j
             where w.status = 'active' limit $1))",
        UNHOLD_MAX,
    )
    .execute(pool)
    .await?;
    Ok(done.rows_affected())
}

/// A company of an account: its first one.
pub async fn a_company(tx: &mut PgConnection, account: AccountId) -> Result<Option<Uuid>, StoreError> {
    Ok(sqlx::query_scalar!("select id from companies where account_id = $1 order by id limit 1", account.0)
        .fetch_optional(tx)
        .await?)
}

/// Whether a webhook is sent to, while nobody changes that; nothing when it is gone.
pub async fn status_of(tx: &mut PgConnection, webhook: WebhookId) -> Result<Option<String>, StoreError> {
    Ok(sqlx::query_scalar!("select status from webhooks where id = $1 for share", webhook.0).fetch_optional(tx).await?)
}
