//! Addresses that are told of events.

use chrono::{DateTime, Utc};
use sqlx::PgConnection;
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
    Ok(sqlx::query_as!(
        WebhookRow,
        "insert into webhooks (id, account_id, company_id, url, events, description, secret)
         select $1, $2, $3, $4, $5, $6, $7
         where (select count(*) from webhooks where account_id = $2) < $8
         returning id, company_id, url, events, description, status, disabled_reason, created_at, updated_at",
        new.webhook.0,
        new.account.0,
        new.company.map(|company| company.0),
        new.url,
        new.events,
        new.description,
        &new.secret[..],
        WEBHOOKS_MAX,
    )
    .fetch_optional(tx)
    .await?)
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
        "select id, company_id, url, events, description, status, disabled_reason, created_at, updated_at
         from webhooks
         where account_id = $1 and ($2::uuid is null or company_id = $2) and ($3::uuid is null or id < $3)
         order by id desc limit $4",
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
        "select id, company_id, url, events, description, status, disabled_reason, created_at, updated_at
         from webhooks where id = $1 and account_id = $2 and ($3::uuid is null or company_id = $3)",
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
}

/// Changes a webhook of an account.
pub async fn update(
    tx: &mut PgConnection,
    (account, bound): Owner,
    webhook: WebhookId,
    change: &Change<'_>,
) -> Result<Option<WebhookRow>, StoreError> {
    Ok(sqlx::query_as!(
        WebhookRow,
        "update webhooks
         set url = coalesce($4, url), events = coalesce($5, events), description = coalesce($6, description),
             status = case $7::boolean when true then 'active' when false then 'disabled' else status end,
             disabled_reason = case $7 when true then null when false then 'disabled by hand' else disabled_reason end,
             updated_at = now()
         where id = $1 and account_id = $2 and ($3::uuid is null or company_id = $3)
         returning id, company_id, url, events, description, status, disabled_reason, created_at, updated_at",
        webhook.0,
        account.0,
        bound.map(|company| company.0),
        change.url,
        change.events,
        change.description,
        change.active,
    )
    .fetch_optional(tx)
    .await?)
}

/// Gives a webhook another secret; the one that it had signs too for
/// [`ROTATION`].
pub async fn rotate(
    tx: &mut PgConnection,
    (account, bound): Owner,
    webhook: WebhookId,
    secret: [u8; 32],
) -> Result<Option<WebhookRow>, StoreError> {
    Ok(sqlx::query_as!(
        WebhookRow,
        "update webhooks
         set old_secret = secret, old_secret_until = now() + $5::bigint * interval '1 millisecond', secret = $4,
             updated_at = now()
         where id = $1 and account_id = $2 and ($3::uuid is null or company_id = $3)
         returning id, company_id, url, events, description, status, disabled_reason, created_at, updated_at",
        webhook.0,
        account.0,
        bound.map(|company| company.0),
        &secret[..],
        millis(ROTATION),
    )
    .fetch_optional(tx)
    .await?)
}

/// Deletes a webhook of an account; false when it has none such.
pub async fn delete(tx: &mut PgConnection, (account, bound): Owner, webhook: WebhookId) -> Result<bool, StoreError> {
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
