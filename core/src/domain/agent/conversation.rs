//! What comes next in an agent's work, by what its journal holds: the next turn of the
//! model, a call of a tool, or the end. Whoever takes over from a dead worker reads the
//! same journal and so comes to the same.

use serde_json::{Value, json};

use super::message::{Message, Reply, Stop, ToolResult};
use crate::domain::outcome::{ErrorClass, Failure};

/// Turns of a model for one piece of work, at most, where its agent says nothing else.
pub const TURNS_DEFAULT: u32 = 50;
/// The same, whatever it says.
pub const TURNS_MAX: u32 = 500;
/// Tools that one turn may ask for.
pub const CALLS_MAX: usize = 32;
/// So often in a row may a model give arguments that its tools refuse.
pub const REFUSED_MAX: u32 = 5;
/// So often may a model ask for the same call in one piece of work, where its agent says nothing
/// else: whatever it is told.
pub const SAME_CALLS_DEFAULT: u32 = 8;
/// The least and the most that an agent may say.
pub const SAME_CALLS: std::ops::RangeInclusive<u32> = 2..=10_000;
/// What of a tool's result a model is shown, in bytes.
pub const RESULT_BYTES_MAX: usize = 64 * 1024;

/// How a call stands.
#[derive(Debug, Clone, PartialEq)]
pub enum Called {
    /// It was to begin; whether it did, and what came of it, is not known.
    Begun,
    /// It was over with this.
    Done {
        /// What the model is told.
        result: ToolResult,
        /// Its arguments were refused before anything was done.
        refused: bool,
    },
}

/// A turn, and the calls that it asked for, by their places in it.
#[derive(Debug, Clone, PartialEq)]
pub struct Turn {
    /// What the model said.
    pub reply: Reply,
    /// What became of the calls, in their order; those that did not begin are missing.
    pub calls: Vec<Option<Called>>,
}

/// What comes next.
#[derive(Debug, Clone, PartialEq)]
pub enum Next {
    /// A turn of the model; the number of it.
    Turn(u32),
    /// A call of a tool.
    Call {
        /// Which turn asked for it.
        turn: u32,
        /// Its place in that turn, from 1.
        call: u32,
        /// The provider's id.
        id: String,
        /// The tool, by the name that the provider was given.
        name: String,
        /// Its arguments.
        input: Value,
        /// It was to begin before; nobody knows what came of it.
        unknown: bool,
    },
    /// The work is done.
    Done(Value),
    /// It goes no further.
    Stuck(Failure),
    /// It goes round in circles: the agent is stopped, with this as evidence.
    Circles(Failure),
}

/// How long a piece of work may go on.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Turns of the model.
    pub turns: u32,
    /// The same call, so often.
    pub same: u32,
}

impl Limits {
    /// From an agent's `config.max_turns` and `config.max_same_calls`.
    pub fn of(config: &Value) -> Self {
        let number =
            |name: &str| config.get(name).and_then(Value::as_u64).map(|n| u32::try_from(n).unwrap_or(u32::MAX));
        Self {
            turns: number("max_turns").unwrap_or(TURNS_DEFAULT).clamp(1, TURNS_MAX),
            same: number("max_same_calls").unwrap_or(SAME_CALLS_DEFAULT).clamp(*SAME_CALLS.start(), *SAME_CALLS.end()),
        }
    }
}

/// Decides by all turns so far.
pub fn next(turns: &[Turn], limits: Limits) -> Next {
    let Some(last) = turns.last() else { return Next::Turn(0) };
    let number = u32::try_from(turns.len()).unwrap_or(u32::MAX) - 1;
    let asked = last.reply.calls().count();
    if asked > CALLS_MAX {
        return Next::Stuck(Failure::invalid(format!(
            "the model asked for {asked} tools at once, over the limit of {CALLS_MAX}"
        )));
    }
    for (place, (id, name, input)) in last.reply.calls().enumerate() {
        let unknown = match last.calls.get(place).and_then(Option::as_ref) {
            Some(Called::Done { .. }) => continue,
            Some(Called::Begun) => true,
            None => false,
        };
        let call = u32::try_from(place + 1).unwrap_or(u32::MAX);
        let (id, name, input) = (id.to_owned(), name.to_owned(), input.clone());
        return Next::Call { turn: number, call, id, name, input, unknown };
    }
    if asked == 0 && last.reply.stop != Stop::Pause {
        return end(&last.reply);
    }
    if refused_in_a_row(turns) >= REFUSED_MAX {
        return Next::Stuck(Failure::invalid(format!(
            "the model gave arguments that its tools refuse in {REFUSED_MAX} turns in a row; the last refusal: {}",
            last_refusal(last)
        )));
    }
    if let Some(asked) = repeated(turns, limits.same) {
        return Next::Circles(Failure::invalid(format!(
            "the model has asked for the same {} times: {}; the agent's `config.max_same_calls` says how often it may",
            limits.same,
            cut_short(&asked),
        )));
    }
    let max = limits.turns;
    match number + 1 {
        next if next < max => Next::Turn(next),
        _ => Next::Stuck(Failure::invalid(format!(
            "no answer after {max} turns of the model; raise the agent's `config.max_turns` (up to {TURNS_MAX}) or give it less to do at once"
        ))),
    }
}

fn end(reply: &Reply) -> Next {
    match reply.stop {
        Stop::Length => Next::Stuck(Failure::invalid(
            "the model's answer was cut off at its limit of tokens; raise the agent's `config.max_tokens`",
        )),
        Stop::Refused => Next::Stuck(Failure::new(
            ErrorClass::Invalid,
            match reply.text() {
                text if text.is_empty() => "the model declined to answer".to_owned(),
                text => format!("the model declined to answer: {text}"),
            },
        )),
        Stop::End | Stop::Tools | Stop::Pause => Next::Done(output(reply)),
    }
}

/// The output that a last turn is: the value that it gave, the JSON object that its words
/// are, or else the words.
fn output(reply: &Reply) -> Value {
    let mut output = match &reply.output {
        Some(Value::Object(map)) => Value::Object(map.clone()),
        Some(Value::String(text)) => json!({"text": text}),
        Some(other) => json!({"value": other}),
        None => {
            let text = reply.text();
            match serde_json::from_str(&text) {
                Ok(Value::Object(map)) => Value::Object(map),
                _ => json!({"text": text}),
            }
        }
    };
    if reply.simulated {
        output["simulated"] = true.into();
    }
    output
}

/// In how many turns, up to the last one, every call was refused.
fn refused_in_a_row(turns: &[Turn]) -> u32 {
    let all_refused = |turn: &&Turn| {
        !turn.calls.is_empty() && turn.calls.iter().all(|call| matches!(call, Some(Called::Done { refused: true, .. })))
    };
    u32::try_from(turns.iter().rev().take_while(all_refused).count()).unwrap_or(u32::MAX)
}

/// A call of the last turn that was asked for so often.
fn repeated(turns: &[Turn], times: u32) -> Option<String> {
    let times = usize::try_from(times).unwrap_or(usize::MAX);
    let count = |asked: (&str, &Value)| {
        turns.iter().flat_map(|turn| turn.reply.calls()).filter(|(_, name, input)| (*name, *input) == asked).count()
    };
    let mut last = turns.last()?.reply.calls();
    last.find(|(_, name, input)| count((*name, *input)) >= times)
        .map(|(_, name, input)| format!("`{name}` with {input}"))
}

/// The beginning of a text, for a sentence.
fn cut_short(text: &str) -> String {
    text.chars().take(200).collect()
}

fn last_refusal(turn: &Turn) -> &str {
    let last = turn.calls.iter().rev().find_map(|call| match call {
        Some(Called::Done { result, .. }) => Some(result.content.as_str()),
        _ => None,
    });
    last.unwrap_or_default()
}

/// What the model is told at its next turn, after its task: all that it said and was told.
pub fn messages(task: String, turns: &[Turn]) -> Vec<Message> {
    let mut messages = vec![Message::User(task)];
    for turn in turns {
        messages.push(Message::Assistant(turn.reply.content.clone()));
        let results: Vec<ToolResult> = turn
            .calls
            .iter()
            .filter_map(|call| match call {
                Some(Called::Done { result, .. }) => Some(result.clone()),
                _ => None,
            })
            .collect();
        if !results.is_empty() {
            messages.push(Message::Results(results));
        }
    }
    messages
}

/// The text that a model is shown of a value, cut where it is long.
pub fn shown(value: &Value) -> String {
    let text = match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    cut(text)
}

/// The same of a text.
pub fn cut(mut text: String) -> String {
    if text.len() > RESULT_BYTES_MAX {
        let whole = text.len();
        let mut at = RESULT_BYTES_MAX;
        while !text.is_char_boundary(at) {
            at -= 1;
        }
        text.truncate(at);
        text.push_str(&format!("\n[cut: {at} of {whole} bytes are shown]"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::message::Block;
    use super::*;

    fn next(turns: &[Turn], turns_max: u32) -> Next {
        super::next(turns, Limits { turns: turns_max, same: SAME_CALLS_DEFAULT })
    }
    use proptest::prelude::*;

    fn says(text: &str) -> Reply {
        reply(vec![Block::Text { text: text.into() }], Stop::End)
    }

    fn reply(content: Vec<Block>, stop: Stop) -> Reply {
        Reply { content, stop, usage: None, model: "m".into(), id: None, output: None, simulated: false }
    }

    fn asks(calls: usize) -> Reply {
        let call = |n: usize| Block::ToolUse { id: format!("t{n}"), name: "look".into(), input: json!({"n": n}) };
        reply((0..calls).map(call).collect(), Stop::Tools)
    }

    fn done(n: usize, refused: bool) -> Option<Called> {
        let result =
            ToolResult { id: format!("t{n}"), name: "look".into(), content: "found".into(), is_error: refused };
        Some(Called::Done { result, refused })
    }

    #[test]
    fn an_answer_is_an_object_or_words() {
        for (text, output) in [
            (r#"{"a": 1}"#, json!({"a": 1})),
            ("[1]", json!({"text": "[1]"})),
            ("hello", json!({"text": "hello"})),
            ("", json!({"text": ""})),
        ] {
            let turns = [Turn { reply: says(text), calls: Vec::new() }];
            assert_eq!(next(&turns, 5), Next::Done(output));
        }
        let cut = reply(vec![], Stop::Length);
        assert!(
            matches!(next(&[Turn { reply: cut, calls: vec![] }], 5), Next::Stuck(f) if f.message.contains("max_tokens"))
        );
    }

    #[test]
    fn every_call_is_made_in_order_before_the_model_is_asked_again() {
        let mut turn = Turn { reply: asks(2), calls: Vec::new() };
        let at = |turn: &Turn| next(std::slice::from_ref(turn), 5);
        assert!(matches!(at(&turn), Next::Call { turn: 0, call: 1, unknown: false, .. }));
        turn.calls = vec![Some(Called::Begun)];
        assert!(matches!(at(&turn), Next::Call { call: 1, unknown: true, .. }));
        turn.calls = vec![done(0, false)];
        assert!(matches!(at(&turn), Next::Call { call: 2, unknown: false, ref id, .. } if id == "t1"));
        turn.calls = vec![done(0, false), done(1, false)];
        assert_eq!(at(&turn), Next::Turn(1));
        assert_eq!(messages("do".into(), &[turn]).len(), 3);
    }

    #[test]
    fn what_goes_round_in_circles_ends() {
        let turn = |refused| Turn { reply: asks(1), calls: vec![done(0, refused)] };
        let same: Vec<Turn> = (0..SAME_CALLS_DEFAULT).map(|_| turn(false)).collect();
        assert!(matches!(next(&same, 500), Next::Circles(f) if f.message.contains("look")));
        assert_eq!(next(&same[1..], 500), Next::Turn(SAME_CALLS_DEFAULT - 1));
        // Other calls between them, and other answers, make it no better.
        let other = Turn { reply: asks(2), calls: vec![done(7, false), done(8, false)] };
        let between: Vec<Turn> = same[1..].iter().cloned().chain([other]).collect();
        assert!(matches!(next(&between, 500), Next::Circles(_)));
        let fine: Vec<Turn> = (0..5).map(|_| turn(false)).collect();
        assert!(matches!(next(&fine, 5), Next::Stuck(f) if f.message.contains("max_turns")));
        let refused: Vec<Turn> = (0..REFUSED_MAX).map(|_| turn(true)).collect();
        assert!(matches!(next(&refused, 500), Next::Stuck(f) if f.message.contains("found")));
        let mixed: Vec<Turn> = refused.iter().take(4).cloned().chain([turn(false)]).collect();
        assert_eq!(next(&mixed, 500), Next::Turn(5));
        let many = Turn { reply: asks(CALLS_MAX + 1), calls: vec![] };
        assert!(matches!(next(&[many], 5), Next::Stuck(_)));
    }

    proptest! {
        // A worker may die after any of its writes: whatever is stored, the work goes on
        // from there, each call is begun at most once in the journal, and it ends.
        #[test]
        fn from_any_prefix_the_same_end_is_reached(plan in prop::collection::vec(0usize..4, 0..6), deaths in prop::collection::vec(any::<bool>(), 64)) {
            let mut turns: Vec<Turn> = Vec::new();
            let mut deaths = deaths.into_iter();
            let (mut bought, mut made) = (0, 0);
            for _ in 0..1_000 {
                match next(&turns, TURNS_DEFAULT) {
                    Next::Turn(n) => {
                        prop_assert_eq!(n as usize, turns.len());
                        // Dead before the answer was stored: nothing has changed.
                        if deaths.next() == Some(true) { continue; }
                        bought += 1;
                        let reply = plan.get(n as usize).filter(|calls| **calls > 0).map_or_else(|| says("end"), |calls| asks(*calls));
                        turns.push(Turn { reply, calls: Vec::new() });
                    }
                    Next::Call { turn, call, unknown, .. } => {
                        let place = call as usize - 1;
                        let calls = &mut turns[turn as usize].calls;
                        prop_assert_eq!(unknown, calls.len() > place);
                        calls.truncate(place);
                        if deaths.next() == Some(true) { calls.push(Some(Called::Begun)); continue; }
                        made += 1;
                        calls.push(done(place, false));
                    }
                    Next::Done(_) => {
                        prop_assert_eq!(bought, turns.len());
                        prop_assert_eq!(made, turns.iter().map(|turn| turn.reply.calls().count()).sum::<usize>());
                        return Ok(());
                    }
                    Next::Stuck(why) | Next::Circles(why) => prop_assert!(false, "{}", why.message),
                }
            }
            prop_assert!(false, "no end");
        }
    }
}
