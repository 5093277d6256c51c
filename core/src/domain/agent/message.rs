//! What is said between an agent and its model, in one form for all providers. The
//! blocks are those of Anthropic's Messages API, which has the most kinds; what only one
//! provider knows passes through unread.

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// A part of what a model has said.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Block {
    /// Words.
    Text {
        /// The words.
        text: String,
    },
    /// It asks for a tool.
    ToolUse {
        /// The provider's id of the call, which the result must name.
        id: String,
        /// The tool, by the name that the provider was given.
        name: String,
        /// Its arguments.
        input: Value,
    },
    /// What only its provider knows, such as thinking; given back to it as it came.
    #[serde(untagged)]
    Other(Value),
}

/// Why a model stopped.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stop {
    /// It has said all.
    End,
    /// It waits for the results of tools.
    Tools,
    /// It ran out of the tokens that it was given.
    Length,
    /// It declined.
    Refused,
    /// It wants to go on: its words are sent back to it.
    Pause,
}

/// What a turn has used, in tokens. The kinds do not overlap.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Usage {
    /// Read, and in no cache.
    pub input: u64,
    /// Said, thinking too.
    pub output: u64,
    /// Read from a cache.
    pub cache_read: u64,
    /// Written into a cache for five minutes.
    pub cache_write: u64,
    /// Written into a cache for an hour.
    pub cache_write_1h: u64,
}

impl Usage {
    /// All that was read.
    pub fn read(&self) -> u64 {
        self.input.saturating_add(self.cache_read).saturating_add(self.cache_write).saturating_add(self.cache_write_1h)
    }
}

/// A turn of a model, as it is stored.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Reply {
    /// What it said.
    pub content: Vec<Block>,
    /// Why it stopped.
    pub stop: Stop,
    /// What it used; unknown where the provider has not said.
    pub usage: Option<Usage>,
    /// Which model answered.
    pub model: String,
    /// The provider's id of the answer, where it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// The output as it is, of an endpoint that gives values instead of words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output: Option<Value>,
    /// It came from no model.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub simulated: bool,
}

impl Reply {
    /// All its words.
    pub fn text(&self) -> String {
        let texts = self.content.iter().filter_map(|block| match block {
            Block::Text { text } => Some(text.as_str()),
            _ => None,
        });
        texts.collect::<Vec<_>>().join("")
    }

    /// The tools that it asks for, in order: id, name and arguments.
    pub fn calls(&self) -> impl Iterator<Item = (&str, &str, &Value)> {
        self.content.iter().filter_map(|block| match block {
            Block::ToolUse { id, name, input } => Some((id.as_str(), name.as_str(), input)),
            _ => None,
        })
    }
}

/// What came of a call of a tool, as the model is told.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ToolResult {
    /// The id of the call.
    pub id: String,
    /// The tool, by the name that the provider was given.
    pub name: String,
    /// What it gave, or why it did not.
    pub content: String,
    /// It did not work.
    #[serde(default)]
    pub is_error: bool,
}

/// A message to a model, or of one.
#[derive(Debug, Clone, PartialEq)]
pub enum Message {
    /// What it is to do.
    User(String),
    /// What it has said.
    Assistant(Vec<Block>),
    /// What the tools gave that it asked for.
    Results(Vec<ToolResult>),
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn blocks_of_a_provider_come_back_as_they_were() {
        let said = json!([
            {"type": "thinking", "thinking": "hm", "signature": "c2ln"},
            {"type": "text", "text": "I look."},
            {"type": "tool_use", "id": "t1", "name": "web_search", "input": {"query": "x"}},
        ]);
        let blocks: Vec<Block> = serde_json::from_value(said.clone()).expect("blocks");
        assert!(matches!(&blocks[0], Block::Other(_)));
        assert_eq!(serde_json::to_value(&blocks).expect("json"), said);
    }
}
