//! Playbooks already read and checked, by version. A version never changes,
//! so an entry is never stale.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use sqlx::{Executor, Postgres};
use uuid::Uuid;

use crate::domain::playbook::{self, Playbook};
use crate::store::{StoreError, playbooks};

/// How many versions are kept; over that, the cache starts again.
const VERSIONS_MAX: usize = 1_000;

/// The cache. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Plans(Arc<Mutex<HashMap<Uuid, Arc<Playbook>>>>);

impl Plans {
    /// Those of the wanted versions that could be found, reading what is not
    /// cached in one statement. A stored text that no longer loads becomes a
    /// playbook that fails its runs with the reason: one tenant's must not
    /// hold up a worker's.
    pub async fn get(
        &self,
        executor: impl Executor<'_, Database = Postgres>,
        wanted: &[(Uuid, Uuid)],
    ) -> Result<HashMap<Uuid, Arc<Playbook>>, StoreError> {
        let mut found = HashMap::new();
        let mut missing: Vec<(Uuid, Uuid)> = Vec::new();
        {
            let cache = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            for (company, version) in wanted {
                match cache.get(version) {
                    Some(plan) => {
                        found.insert(*version, Arc::clone(plan));
                    }
                    None if missing.iter().any(|(_, v)| v == version) => {}
                    None => missing.push((*company, *version)),
                }
            }
        }
        if missing.is_empty() {
            return Ok(found);
        }
        let (companies, versions): (Vec<_>, Vec<_>) = missing.into_iter().unzip();
        for (version, yaml) in playbooks::versions(executor, &companies, &versions).await? {
            let plan = Arc::new(playbook::load(&yaml).unwrap_or_else(|problems| {
                let first = problems.first().map(ToString::to_string).unwrap_or_default();
                tracing::error!(version.id = %version, problem = first, "a stored playbook does not load any more");
                Playbook::unreadable(format!("this version of capx cannot read the playbook: {first}"))
            }));
            self.insert(version, Arc::clone(&plan));
            found.insert(version, plan);
        }
        Ok(found)
    }

    fn insert(&self, version: Uuid, plan: Arc<Playbook>) {
        let mut cache = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if cache.len() >= VERSIONS_MAX {
            cache.clear();
        }
        cache.insert(version, plan);
    }
}
