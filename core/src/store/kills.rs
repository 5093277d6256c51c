//! Who was stopped at once.

use sqlx::PgPool;
use uuid::Uuid;

use super::StoreError;
use crate::domain::ids::{AgentId, CompanyId, PlaybookId};

/// Somebody who can be stopped at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Subject {
    /// A company, with all that is its.
    Company(CompanyId),
    /// All runs of a playbook.
    Playbook(CompanyId, PlaybookId),
    /// An agent.
    Agent(CompanyId, AgentId),
}

impl Subject {
    fn key(self) -> (i16, Uuid, Uuid) {
        match self {
            Self::Company(company) => (0, company.0, company.0),
            Self::Playbook(company, playbook) => (1, company.0, playbook.0),
            Self::Agent(company, agent) => (2, company.0, agent.0),
        }
    }
}

/// Who of some was stopped at once, and not let go on since.
pub async fn killed(pool: &PgPool, of: &[Subject]) -> Result<Vec<Subject>, StoreError> {
    let keys: Vec<(i16, Uuid, Uuid)> = of.iter().map(|subject| subject.key()).collect();
    let places = sqlx::query_scalar!(
        r#"with k as materialized (
               select * from unnest($1::smallint[], $2::uuid[], $3::uuid[]) with ordinality as k (kind, company_id, id, place)
           )
           select k.place as "place!" from k
           cross join lateral (select c.killed_at from companies c where c.id = k.id offset 0) c
           where k.kind = 0 and c.killed_at is not null
           union all
           select k.place from k
           cross join lateral (
               select p.killed_at from playbooks p where p.company_id = k.company_id and p.id = k.id offset 0
           ) p
           where k.kind = 1 and p.killed_at is not null
           union all
           select k.place from k
           cross join lateral (
               select a.paused_by from agents a where a.company_id = k.company_id and a.id = k.id offset 0
           ) a
           where k.kind = 2 and a.paused_by = 'kill'"#,
        &keys.iter().map(|(kind, ..)| *kind).collect::<Vec<_>>(),
        &keys.iter().map(|(_, company, _)| *company).collect::<Vec<_>>(),
        &keys.iter().map(|(.., id)| *id).collect::<Vec<_>>(),
    )
    .fetch_all(pool)
    .await?;
    Ok(places.into_iter().filter_map(|place| of.get(usize::try_from(place - 1).ok()?).copied()).collect())
}
