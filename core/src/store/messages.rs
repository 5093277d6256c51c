//! Messages among agents, and from them to people.

use sqlx::PgConnection;

use super::StoreError;
use crate::domain::ids::{AgentId, CompanyId, MessageId, RunId};

/// A message to be.
#[derive(Debug)]
pub struct NewMessage<'a> {
    /// Whose.
    pub company: CompanyId,
    /// To which agent.
    pub to: Option<AgentId>,
    /// Where to.
    pub channel: Option<&'a str>,
    /// From whom.
    pub from: Option<AgentId>,
    /// What it says.
    pub body: &'a str,
    /// In which run.
    pub run: RunId,
    /// The call that sends it.
    pub call: &'a str,
}

/// Stores a message, once for each call; which it is, and whether it is new.
pub async fn insert(tx: &mut PgConnection, new: &NewMessage<'_>) -> Result<(MessageId, bool), StoreError> {
    let row = sqlx::query!(
        r#"insert into messages (company_id, id, to_agent, channel, from_agent, body, run_id, call_key)
           values ($1, $2, $3, $4, $5, $6, $7, $8)
           on conflict (company_id, call_key) where call_key is not null do update set call_key = excluded.call_key
           returning id, (xmax = 0) as "is_new!""#,
        new.company.0,
        MessageId::new().0,
        new.to.map(|agent| agent.0),
        new.channel,
        new.from.map(|agent| agent.0),
        new.body,
        new.run.0,
        new.call,
    )
    .fetch_one(tx)
    .await?;
    Ok((MessageId(row.id), row.is_new))
}
