//! Providers that take nothing for a while.

use std::time::Duration;

use sqlx::PgConnection;

use super::StoreError;
use super::jobs::millis;

/// Whether a provider is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Enter {
    /// It is.
    Open,
    /// It is, by this one call alone: to see whether it takes anything again.
    Probe,
    /// Not before so long.
    Closed(Duration),
}

/// How long a probe has before another one may be made.
pub const PROBE: Duration = Duration::from_secs(120);
/// How long those wait who find a probe under way.
pub const BEHIND_PROBE: Duration = Duration::from_secs(2);

/// Asks whether a provider may be asked.
pub async fn enter(tx: &mut PgConnection, gate: &str) -> Result<Enter, StoreError> {
    let row = sqlx::query!(
        r#"select (extract(epoch from closed_until - clock_timestamp()) * 1000)::bigint as "left_ms!",
                  coalesce(probe_until > clock_timestamp(), false) as "probed!"
           from provider_gates where gate = $1"#,
        gate,
    )
    .fetch_optional(&mut *tx)
    .await?;
    let Some(row) = row else { return Ok(Enter::Open) };
    if let Ok(left) = u64::try_from(row.left_ms)
        && left > 0
    {
        return Ok(Enter::Closed(Duration::from_millis(left)));
    }
    if row.probed {
        return Ok(Enter::Closed(BEHIND_PROBE));
    }
    // One of those who come at once is first.
    let first = sqlx::query!(
        "update provider_gates set probe_until = clock_timestamp() + $2::bigint * interval '1 millisecond'
         where gate = $1 and closed_until <= clock_timestamp()
             and (probe_until is null or probe_until <= clock_timestamp())",
        gate,
        millis(PROBE),
    )
    .execute(tx)
    .await?;
    Ok(if first.rows_affected() == 1 { Enter::Probe } else { Enter::Closed(BEHIND_PROBE) })
}

/// Closes a gate for everybody, or for longer.
pub async fn close(tx: &mut PgConnection, gate: &str, closed: Duration, reason: &str) -> Result<(), StoreError> {
    sqlx::query!(
        "insert into provider_gates as g (gate, closed_until, reason)
         values ($1, clock_timestamp() + $2::bigint * interval '1 millisecond', $3)
         on conflict (gate) do update
         set closed_until = greatest(g.closed_until, excluded.closed_until), probe_until = null, reason = excluded.reason",
        gate,
        millis(closed),
        reason,
    )
    .execute(tx)
    .await?;
    Ok(())
}

/// The provider has answered: the gate is open.
pub async fn open(tx: &mut PgConnection, gate: &str) -> Result<(), StoreError> {
    // Nothing is locked where there is no such gate, as nearly always.
    sqlx::query!("delete from provider_gates where gate = $1 and closed_until <= clock_timestamp()", gate)
        .execute(tx)
        .await?;
    Ok(())
}

/// A call that was to see whether the provider takes anything again was none, for a reason of its
/// own: the next one sees.
pub async fn unprobe(tx: &mut PgConnection, gate: &str) -> Result<(), StoreError> {
    sqlx::query!("update provider_gates set probe_until = null where gate = $1 and probe_until is not null", gate)
        .execute(tx)
        .await?;
    Ok(())
}
