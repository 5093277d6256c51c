//! Requests from outside that start playbooks, and what they are signed with.

use sqlx::{PgConnection, PgPool};

use super::StoreError;
use crate::domain::ids::{CompanyId, PlaybookId};
use crate::domain::webhook::{Secret, TOLERANCE_S};

/// How many playbooks one name may start.
pub const HOOKS_MAX: i64 = 20;
/// How long a secret signs beside the one that has taken its place.
pub const ROTATION: std::time::Duration = std::time::Duration::from_secs(24 * 3600);

/// A playbook that requests under a name start.
#[derive(Debug)]
pub struct Hook {
    /// Which.
    pub playbook: PlaybookId,
    /// What signs, the new one first.
    pub secrets: Vec<Vec<u8>>,
}

/// The playbooks that requests under a name start, and the database's time in seconds since 1970;
/// none where there is no such name, or nothing goes on in the company any more.
pub async fn of(pool: &PgPool, company: CompanyId, name: &str) -> Result<(i64, Vec<Hook>), StoreError> {
    let now = sqlx::query_scalar!(r#"select extract(epoch from clock_timestamp())::bigint as "now!""#)
        .fetch_one(pool)
        .await?;
    let rows = sqlx::query!(
        r#"select t.playbook_id, t.secret as "secret!",
                  case when t.old_secret_until > clock_timestamp() then t.old_secret end as old_secret
           from triggers t
           join companies c on c.id = t.company_id and c.status <> 'stopped'
           join playbooks p on p.company_id = t.company_id and p.id = t.playbook_id and p.status = 'active'
           where t.company_id = $1 and t.kind = 'webhook' and t.event = $2 and t.secret is not null
           order by t.playbook_id limit $3"#,
        company.0,
        name,
        HOOKS_MAX,
    )
    .fetch_all(pool)
    .await?;
    let hooks = rows.into_iter().map(|row| Hook {
        playbook: PlaybookId(row.playbook_id),
        secrets: [row.secret].into_iter().chain(row.old_secret).collect(),
    });
    Ok((now, hooks.collect()))
}

/// Notes that a try of a request was taken; false when the very same was before.
pub async fn take(
    tx: &mut PgConnection,
    (company, playbook): (CompanyId, PlaybookId),
    id: &str,
    sent_at: i64,
) -> Result<bool, StoreError> {
    let done = sqlx::query!(
        "insert into hook_calls (company_id, playbook_id, call_id, sent_at) values ($1, $2, $3, $4)
         on conflict do nothing",
        company.0,
        playbook.0,
        id,
        sent_at,
    )
    .execute(tx)
    .await?;
    Ok(done.rows_affected() == 1)
}

/// For so long the same message starts nothing more whose sender does not say when it was sent, as
/// GitHub does not.
pub const UNDATED_DAYS: i64 = 90;
/// How many one statement forgets.
pub const PRUNE_MAX: i64 = 5_000;

/// Forgets tries that nobody can repeat any more, since their time is over; says how many.
pub async fn prune(pool: &PgPool) -> Result<u64, StoreError> {
    let done = sqlx::query!(
        "delete from hook_calls where ctid = any (array(
             select ctid from hook_calls
             where at < clock_timestamp() - $1::bigint * interval '1 second'
                 and (sent_at > 0 or at < clock_timestamp() - $3::bigint * interval '1 day')
             limit $2))",
        // One from the future may be repeated until its own time is over.
        3 * TOLERANCE_S,
        PRUNE_MAX,
        UNDATED_DAYS,
    )
    .execute(pool)
    .await?;
    Ok(done.rows_affected())
}

/// The secret of a playbook that nobody was shown, once.
pub async fn show(
    tx: &mut PgConnection,
    company: CompanyId,
    playbook: PlaybookId,
) -> Result<Option<Vec<u8>>, StoreError> {
    let secret = sqlx::query_scalar!(
        r#"update triggers set secret_shown = true
           where company_id = $1 and playbook_id = $2 and kind = 'webhook' and secret is not null and not secret_shown
           returning secret as "secret!""#,
        company.0,
        playbook.0,
    )
    .fetch_optional(tx)
    .await?;
    Ok(secret)
}

/// Gives a playbook another secret; the old one signs for a while. False when it takes no requests.
pub async fn rotate(
    tx: &mut PgConnection,
    company: CompanyId,
    playbook: PlaybookId,
    secret: &Secret,
) -> Result<bool, StoreError> {
    let done = sqlx::query!(
        "update triggers
         set old_secret = secret, secret = $3, secret_shown = true,
             old_secret_until =
                 case when secret is not null then clock_timestamp() + $4::bigint * interval '1 second' end
         where company_id = $1 and playbook_id = $2 and kind = 'webhook'",
        company.0,
        playbook.0,
        secret.as_slice(),
        i64::try_from(ROTATION.as_secs()).unwrap_or(i64::MAX),
    )
    .execute(tx)
    .await?;
    Ok(done.rows_affected() == 1)
}
