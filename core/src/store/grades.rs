//! What steps with a rubric have said, and what it came to.

use serde_json::Value;
use sqlx::{Executor, PgConnection, PgPool, Postgres};
use uuid::Uuid;

use super::StoreError;
use crate::domain::ids::{CompanyId, RunId};
use crate::domain::plan::{Draft, Stage};

/// The place of what is said of the whole run.
pub const RUN: i32 = -1;

/// What is to be kept of a draft, or of a run.
#[derive(Debug, Clone)]
pub struct NewGrade {
    /// The step, or [`RUN`].
    pub step: i32,
    /// How often the run had jumped.
    pub round: i32,
    /// How it stands.
    pub draft: Draft,
}

/// Keeps a draft, in the transaction that moves its run.
pub async fn put(tx: &mut PgConnection, company: CompanyId, run: RunId, new: &NewGrade) -> Result<(), StoreError> {
    sqlx::query!(
        "insert into run_grades (company_id, run_id, step, round, stage, drafts, returns, output, evaluation)
         values ($1, $2, $3, $4, $5, $6, $7, $8, $9)
         on conflict (company_id, run_id, step) do update
         set round = excluded.round, stage = excluded.stage, drafts = excluded.drafts, returns = excluded.returns,
             output = excluded.output, evaluation = coalesce(excluded.evaluation, run_grades.evaluation)",
        company.0,
        run.0,
        new.step,
        new.round,
        new.draft.stage.as_str(),
        count(new.draft.count),
        count(new.draft.returns),
        new.draft.output,
        new.draft.evaluation,
    )
    .execute(tx)
    .await?;
    Ok(())
}

fn count(count: u32) -> i32 {
    i32::try_from(count).unwrap_or(i32::MAX)
}

/// What is kept of a step.
#[derive(Debug)]
pub struct GradeRow {
    /// Of which run.
    pub run: Uuid,
    /// Which step.
    pub step: i32,
    /// How often the run had jumped.
    pub round: i32,
    /// The draft.
    pub draft: Draft,
}

/// All that is kept of the steps of some runs.
pub async fn of_runs(pool: &PgPool, runs: &[(CompanyId, RunId)]) -> Result<Vec<GradeRow>, StoreError> {
    let rows = sqlx::query!(
        r#"select g.run_id, g.step, g.round, g.stage, g.drafts, g.returns, g.output, g.evaluation
           from unnest($1::uuid[], $2::uuid[]) as k (company_id, run_id)
           cross join lateral (
               select * from run_grades g
               where g.company_id = k.company_id and g.run_id = k.run_id and g.step >= 0 offset 0
           ) g"#,
        &runs.iter().map(|(company, _)| company.0).collect::<Vec<_>>(),
        &runs.iter().map(|(_, run)| run.0).collect::<Vec<_>>(),
    )
    .fetch_all(pool)
    .await?;
    let number = |n: i32| u32::try_from(n).unwrap_or(0);
    rows.into_iter()
        .map(|row| {
            let stage = Stage::from_name(&row.stage)
                .ok_or_else(|| StoreError::Unreadable(format!("the stage {} of a draft", row.stage)))?;
            let draft = Draft {
                stage,
                count: number(row.drafts),
                returns: number(row.returns),
                output: row.output,
                evaluation: row.evaluation,
            };
            Ok(GradeRow { run: row.run_id, step: row.step, round: row.round, draft })
        })
        .collect()
}

/// What has become of the draft that waited for a person, with what was said.
pub async fn settle(
    tx: &mut PgConnection,
    company: CompanyId,
    run: RunId,
    step: i32,
    stage: Stage,
    words: Option<&str>,
) -> Result<(), StoreError> {
    sqlx::query!(
        r#"update run_grades
           set stage = $4::text,
               evaluation = case when $4 = 'rejected'
                   then evaluation || jsonb_build_object('decision', 'reject', 'feedback', $5::text)
                   else evaluation end
           where company_id = $1 and run_id = $2 and step = $3 and stage = 'escalated'"#,
        company.0,
        run.0,
        step,
        stage.as_str(),
        words,
    )
    .execute(tx)
    .await?;
    Ok(())
}

/// Steps whose drafts were turned down are tried anew: a person is asked again where
/// nobody had decided, and another draft is made where somebody had.
pub async fn reopen(tx: &mut PgConnection, company: CompanyId, run: RunId, steps: &[i32]) -> Result<(), StoreError> {
    sqlx::query!(
        "update run_grades
         set stage = case when stage = 'expired' then 'escalated' else 'blocked' end,
             output = case when stage = 'expired' then output end, returns = 0
         where company_id = $1 and run_id = $2 and step = any ($3) and stage in ('expired', 'rejected')",
        company.0,
        run.0,
        steps,
    )
    .execute(tx)
    .await?;
    Ok(())
}

/// What the steps of a run came to, as people read it, and at [`RUN`] the run itself.
pub async fn shown(
    executor: impl Executor<'_, Database = Postgres>,
    company: CompanyId,
    run: RunId,
) -> Result<Vec<(i32, Value)>, StoreError> {
    let rows = sqlx::query!(
        r#"select step, evaluation as "evaluation!" from run_grades
           where company_id = $1 and run_id = $2 and evaluation is not null order by step"#,
        company.0,
        run.0,
    )
    .fetch_all(executor)
    .await?;
    Ok(rows.into_iter().map(|row| (row.step, row.evaluation)).collect())
}

/// Gives a run what some steps of another came to.
pub async fn copy(
    tx: &mut PgConnection,
    company: CompanyId,
    from: RunId,
    to: RunId,
    steps: &[i32],
) -> Result<(), StoreError> {
    sqlx::query!(
        "insert into run_grades (company_id, run_id, step, round, stage, drafts, returns, evaluation)
         select company_id, $3, step, 0, stage, drafts, returns, evaluation
         from run_grades where company_id = $1 and run_id = $2 and step = any ($4) and stage = 'passed'",
        company.0,
        from.0,
        to.0,
        steps,
    )
    .execute(tx)
    .await?;
    Ok(())
}
