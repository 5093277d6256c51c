//! Who paused what, and why: companies, playbooks, agents.

use chrono::{DateTime, Utc};
use sqlx::PgConnection;
use uuid::Uuid;

use super::StoreError;
use crate::domain::ids::{AccountId, CompanyId};

/// Notes who paused something and why; the first word stays.
pub async fn set(
    tx: &mut PgConnection,
    company: CompanyId,
    (kind, id): (&str, Uuid),
    by: &str,
    reason: Option<&str>,
) -> Result<(), StoreError> {
    sqlx::query!(
        "insert into pauses (company_id, kind, id, paused_by, reason) values ($1, $2, $3, $4, $5) on conflict do nothing",
        company.0,
        kind,
        id,
        by,
        reason,
    )
    .execute(tx)
    .await?;
    Ok(())
}

/// It goes on.
pub async fn clear(tx: &mut PgConnection, company: CompanyId, (kind, id): (&str, Uuid)) -> Result<(), StoreError> {
    sqlx::query!("delete from pauses where company_id = $1 and kind = $2 and id = $3", company.0, kind, id)
        .execute(tx)
        .await?;
    Ok(())
}

/// Something that is paused.
#[derive(Debug, Clone)]
pub struct PausedRow {
    /// `company`, `playbook` or `agent`.
    pub kind: String,
    /// Which.
    pub id: Uuid,
    /// Whose.
    pub company_id: Uuid,
    /// Its name, or its role.
    pub name: String,
    /// By which key, or by what: `budget` or `breaker`.
    pub paused_by: Option<String>,
    /// Why.
    pub reason: Option<String>,
    /// Since when; not known of what was paused by an older version.
    pub since: Option<DateTime<Utc>>,
}

/// The most that is listed.
pub const LISTED_MAX: i64 = 1_000;

/// Everything of an account that is paused, whoever paused it.
pub async fn list(
    tx: &mut PgConnection,
    account: AccountId,
    company: Option<CompanyId>,
) -> Result<Vec<PausedRow>, StoreError> {
    Ok(sqlx::query_as!(
        PausedRow,
        r#"select x.kind as "kind!", x.id as "id!", c.id as "company_id!", x.name as "name!",
               coalesce(p.paused_by, x.paused_by) as paused_by, coalesce(p.reason, x.reason) as reason, p.since as "since?"
           from companies c
           cross join lateral (
               select 'company' as kind, c.id, c.name, null as paused_by, null as reason where c.status = 'paused'
               union all
               select 'playbook', b.id, b.name, null, null from playbooks b
               where b.company_id = c.id and b.status = 'paused'
               union all
               select 'agent', a.id, a.role, a.paused_by, a.paused_reason from agents a
               where a.company_id = c.id and a.status = 'paused'
           ) x
           left join pauses p on p.company_id = c.id and p.kind = x.kind and p.id = x.id
           where c.account_id = $1 and ($2::uuid is null or c.id = $2)
           order by c.id, x.kind desc, x.id limit $3"#,
        account.0,
        company.map(|company| company.0),
        LISTED_MAX,
    )
    .fetch_all(tx)
    .await?)
}
