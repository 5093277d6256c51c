//! Creating playbooks and their versions.

use std::collections::HashSet;

use super::{Engine, EngineError, FieldProblem, repeating};
use crate::domain::digest::sha256;
use crate::domain::ids::CompanyId;
use crate::domain::playbook::{self, Playbook, Problem};
use crate::store::playbooks::{NewPlaybook, Upserted};
use crate::store::{playbooks, tenants};

/// A request to create a playbook.
#[derive(Debug, Clone)]
pub struct CreatePlaybook {
    /// Unique within the company; wins over the name in the text.
    pub name: Option<String>,
    /// For people.
    pub description: Option<String>,
    /// The definition.
    pub yaml: String,
    /// For filters.
    pub tags: Vec<String>,
}

/// A created playbook.
#[derive(Debug)]
pub struct Created {
    /// Which, and whether anything is new.
    pub upserted: Upserted,
    /// Its name.
    pub name: String,
    /// The model.
    pub playbook: Playbook,
    /// What will fail at run time unless something changes.
    pub warnings: Vec<String>,
}

/// Checks and stores a playbook, or says everything that is wrong with it.
pub async fn create(engine: &Engine, company: CompanyId, request: &CreatePlaybook) -> Result<Created, EngineError> {
    let playbook = playbook::load(&request.yaml).map_err(|problems| invalid(&request.yaml, &problems))?;
    let name = request.name.clone().unwrap_or_else(|| playbook.name.clone());
    let description = request.description.clone().or_else(|| playbook.description.clone());
    let warnings = role_warnings(engine, company, &playbook).await?;
    let new = NewPlaybook {
        company,
        name: &name,
        description: description.as_deref(),
        tags: &request.tags,
        yaml: &request.yaml,
        hash: sha256(&request.yaml),
    };
    let upserted = repeating(|| async {
        let mut tx = engine.pool.begin().await?;
        let upserted = playbooks::upsert(&mut tx, &new).await?;
        tx.commit().await?;
        Ok(upserted)
    })
    .await?;
    Ok(Created { upserted, name, playbook, warnings })
}

/// Every problem of a text as a problem of the field `yaml`, with its place,
/// cause, suggestion and the line it stands in.
fn invalid(text: &str, problems: &[Problem]) -> EngineError {
    let fields = problems.iter().map(|problem| {
        let excerpt = problem.excerpt(text).map(|e| format!("\n{e}")).unwrap_or_default();
        FieldProblem::new("yaml", format!("{problem}{excerpt}"))
    });
    EngineError::Invalid(fields.collect())
}

async fn role_warnings(engine: &Engine, company: CompanyId, playbook: &Playbook) -> Result<Vec<String>, EngineError> {
    let agents = tenants::agents_of(&engine.pool, &[company.0]).await?;
    let known: HashSet<&str> = agents.iter().map(|agent| agent.role.as_str()).collect();
    let mut warned = HashSet::new();
    Ok(playbook
        .steps
        .iter()
        .filter_map(|step| step.role.as_deref())
        .filter(|role| !known.contains(role) && warned.insert(*role))
        .map(|role| {
            let near = playbook::problem::did_you_mean(role, known.iter().copied())
                .map(|hint| format!("; {hint}"))
                .unwrap_or_default();
            format!("no agent of this company has the role `{role}` yet, so a run fails at its step{near}")
        })
        .collect())
}
