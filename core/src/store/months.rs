//! History in months: tables are cut by the times that their ids begin with. What is old is deleted
//! from one month, and goes, as a file, with the last of it. A table's first part, the past, and its
//! last one, the far end, have no end: whatever an id says, there is a part for it.

use std::time::Duration;

use sqlx::PgPool;

use super::StoreError;
use super::jobs::millis;

/// The tables that are cut into months.
pub const WHOLES: [&str; 3] = ["events", "deliveries", "delivery_attempts"];

/// So far ahead months are made: should nobody do so for that long, what happens goes to the far end.
pub const AHEAD: Duration = Duration::from_secs(62 * 24 * 3600);

/// Makes a table's months up to [`AHEAD`]; says how many.
///
/// # Errors
/// Also where somebody holds the table for more than half a second.
pub async fn make(pool: &PgPool, whole: &str) -> Result<i32, StoreError> {
    Ok(sqlx::query_scalar!(
        r#"select make_months($1, $2::bigint * interval '1 millisecond') as "made!""#,
        whole,
        millis(AHEAD)
    )
    .fetch_one(pool)
    .await?)
}

/// Drops the oldest month of a table, if it is over and empty; says which it was.
///
/// # Errors
/// Also where somebody holds the table for more than half a second.
pub async fn drop_oldest(pool: &PgPool, whole: &str) -> Result<Option<String>, StoreError> {
    Ok(sqlx::query_scalar!("select drop_month($1)", whole).fetch_one(pool).await?)
}
