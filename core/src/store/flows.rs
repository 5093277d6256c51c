//! What bounds a company's share of a queue, as the operator has it.

use sqlx::PgConnection;
use uuid::Uuid;

use super::StoreError;
use crate::domain::ids::CompanyId;

/// How much of a queue a company may have.
#[derive(Debug, Clone)]
pub struct LimitRow {
    /// Whose.
    pub company_id: Uuid,
    /// So many at once.
    pub max_running: Option<i32>,
    /// So many a second.
    pub rate: Option<f64>,
}

/// The most that is listed.
pub const LISTED_MAX: i64 = 1_000;

/// The limits of companies in a queue.
pub async fn limits(tx: &mut PgConnection, queue: &str) -> Result<Vec<LimitRow>, StoreError> {
    Ok(sqlx::query_as!(
        LimitRow,
        r#"select company_id as "company_id!", max_running, rate from flows
           where queue = $1 and company_id is not null order by flow_id limit $2"#,
        queue,
        LISTED_MAX,
    )
    .fetch_all(tx)
    .await?)
}

/// Limits a company in a queue, or lets it have what there is; false when there is no such company.
pub async fn set(
    tx: &mut PgConnection,
    queue: &str,
    company: CompanyId,
    max_running: Option<i32>,
    rate: Option<f64>,
) -> Result<bool, StoreError> {
    if max_running.is_none() && rate.is_none() {
        sqlx::query!("delete from flows where queue = $1 and flow_id = $2", queue, company.0).execute(&mut *tx).await?;
    } else {
        sqlx::query!(
            "insert into flows (queue, company_id, max_running, rate)
             select $1, id, $3, $4 from companies where id = $2
             on conflict (queue, flow_id) do update set max_running = excluded.max_running, rate = excluded.rate",
            queue,
            company.0,
            max_running,
            rate,
        )
        .execute(&mut *tx)
        .await?;
    }
    Ok(sqlx::query_scalar!(r#"select exists (select from companies where id = $1) as "known!""#, company.0)
        .fetch_one(tx)
        .await?)
}
