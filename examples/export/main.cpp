// Read token ids with an exported model, without Python: main model.pt2 < ids.txt
// Prints a line for each token: its logits, from which the next token is predicted. README.md says how to build it.

#include <ATen/ATen.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdio>
#include <iostream>
#include <iterator>
#include <map>
#include <sstream>

int main(int, char** arguments) {
  const std::map<std::string, at::ScalarType> types = {
      {"float32", at::kFloat}, {"int64", at::kLong}, {"bool", at::kBool}};
  torch::inductor::AOTIModelPackageLoader step(arguments[1]);
  std::istringstream lines(step.get_metadata()["inputs"]);
  std::vector<at::Tensor> inputs;  // ids, mask, start, then the state
  for (std::string line, name, type; std::getline(lines, line);) {
    std::istringstream words(line);
    words >> name >> type;
    std::vector<int64_t> sizes{std::istream_iterator<int64_t>(words), {}};
    inputs.push_back(at::zeros(sizes, types.at(type)));
  }
  const int64_t n = inputs[0].size(1);

  const std::vector<int64_t> stream{std::istream_iterator<int64_t>(std::cin), {}};
  for (size_t begin = 0; begin < stream.size(); begin += n) {
    const int64_t length = std::min<int64_t>(n, stream.size() - begin);
    for (int64_t i = 0; i < n; i++) {
      inputs[0][0][i] = i < length ? stream[begin + i] : 0;
      inputs[1][0][i] = i < length;  // other rows stay empty
    }
    inputs[2][0] = begin == 0;
    const auto outputs = step.run(inputs);
    std::copy(outputs.begin() + 1, outputs.end(), inputs.begin() + 3);
    for (int64_t i = 0; i < length; i++) {
      const at::Tensor row = outputs[0][0][i].contiguous();
      for (int64_t v = 0; v < row.numel(); v++) std::printf("%.9g ", row.data_ptr<float>()[v]);
      std::printf("\n");
    }
  }
}
