//! The audit log: rows that are only ever appended, each tied to the one before.

use sqlx::{Executor, PgConnection, PgPool, Postgres};

use super::StoreError;
use crate::domain::audit::{Entry, GENESIS, Link, chain};
use crate::domain::ids::CompanyId;

/// Appends an entry in the caller's transaction, which the head's lock makes the only one of
/// its company until its end.
pub async fn append(tx: &mut PgConnection, company: CompanyId, entry: &Entry) -> Result<(), StoreError> {
    let head = sqlx::query!(
        r#"insert into audit_heads as h (company_id, seq, hash) values ($1, 0, $2)
           on conflict (company_id) do update set seq = h.seq
           returning seq, hash, (extract(epoch from clock_timestamp()) * 1000000)::bigint as "at_us!""#,
        company.0,
        &GENESIS[..],
    )
    .fetch_one(&mut *tx)
    .await?;
    let link = chain(company, &head.hash, head.seq + 1, head.at_us, entry);
    sqlx::query!(
        "with entry as (
             insert into audit (company_id, seq, at, kind, actor, data, prev, hash)
             values ($1, $2, to_timestamp($3::bigint / 1000000) + ($3 % 1000000) * interval '1 microsecond', $4, $5, $6, $7, $8)
         )
         update audit_heads set seq = $2, hash = $8 where company_id = $1",
        company.0,
        link.seq,
        link.at_us,
        link.kind,
        link.actor,
        link.data,
        link.prev,
        link.hash,
    )
    .execute(tx)
    .await?;
    Ok(())
}

/// Entries of a company after one, in order.
pub async fn after(
    executor: impl Executor<'_, Database = Postgres>,
    company: CompanyId,
    seq: i64,
    limit: i64,
) -> Result<Vec<Link>, StoreError> {
    Ok(sqlx::query_as!(
        Link,
        r#"select seq, (extract(epoch from at) * 1000000)::bigint as "at_us!", kind, actor, data, prev, hash
           from audit where company_id = $1 and seq > $2 order by seq limit $3"#,
        company.0,
        seq,
        limit,
    )
    .fetch_all(executor)
    .await?)
}

/// Entries of a company before one, the newest first.
pub async fn before(
    executor: impl Executor<'_, Database = Postgres>,
    company: CompanyId,
    seq: i64,
    limit: i64,
) -> Result<Vec<Link>, StoreError> {
    Ok(sqlx::query_as!(
        Link,
        r#"select seq, (extract(epoch from at) * 1000000)::bigint as "at_us!", kind, actor, data, prev, hash
           from audit where company_id = $1 and seq < $2 order by seq desc limit $3"#,
        company.0,
        seq,
        limit,
    )
    .fetch_all(executor)
    .await?)
}

/// Where each company's chain ends.
pub async fn heads(pool: &PgPool) -> Result<Vec<(CompanyId, i64, Vec<u8>)>, StoreError> {
    let rows =
        sqlx::query!("select company_id, seq, hash from audit_heads order by company_id").fetch_all(pool).await?;
    Ok(rows.into_iter().map(|row| (CompanyId(row.company_id), row.seq, row.hash)).collect())
}
